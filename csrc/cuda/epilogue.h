// The launchers of the CUDA kernels as plain C: pointers, sizes, strides and a stream. The bindings
// compile without CUDA's headers and the kernels without PyTorch's. Each launcher queues its
// kernels and returns a cudaError_t, 0 for success.
//
// All arrays are contiguous, except chunks, `out` and the dense operands of the sparse products.
// The accumulator dtype is float64 for float64 chunks, else float32.
#pragma once

#include <stdint.h>

#define OPD_MAX_SELECTED 256  // largest K of a state that selects
#define OPD_MAX_GIVEN 512     // largest K of given ids
#define OPD_PIECE 64          // entries of a sparse matrix for each row of partial sums

// The kernels count columns in int, and a grid has at most 65,535 blocks for their spans.
#define OPD_MAX_COLUMNS (1 << 28)  // columns of a chunk, and token ids
#define OPD_MAX_DIM (1 << 22)      // columns of a dense operand

#ifdef __cplusplus
extern "C" {
#endif

enum OpdDtype { OPD_FLOAT32, OPD_FLOAT64, OPD_BFLOAT16, OPD_FLOAT16 };

// A row-major matrix with a row stride.
struct OpdMatrix {
  void* data;
  enum OpdDtype dtype;
  int64_t rows, columns, stride;
};

// z = outer * tanh(inner * (raw + bias)) if capped, else outer * (raw + bias).
struct OpdHead {
  const void* bias;  // [v] of the chunk's columns in the accumulator dtype, or null
  int capped;
  double inner, outer;
};

// RowState of opd_kernels/backends/records.py in the accumulator dtype; moments may be null.
struct OpdState {
  void* values;  // [n, k]
  int64_t* ids;  // [n, k]
  int64_t k;
  int selects;
  void *maxima, *sums, *moments;  // [n]
};

// Adds the chunk's logits to the state: to the running top-K if state.selects, else to the values
// at the given ids; the others to the tail and, if moments is not null, to the moment for the
// entropy. A whole block processes a row if block_per_row, else one warp.
int opd_update(struct OpdMatrix chunk, int64_t first_id, struct OpdHead head,
               struct OpdState state, int block_per_row, void* stream);

// Writes dL / draw to out [n, v], which is the chunk, or has its dtype, or 16 bits for a float32
// chunk. dL / dz is dvalues [n, k] at ids [n, k], and dtails [n] * exp(z - tails [n]) in all other
// columns.
int opd_gradient(struct OpdMatrix chunk, int64_t first_id, struct OpdHead head,
                 const int64_t* ids, const void* dvalues, int64_t k, const void* tails,
                 const void* dtails, struct OpdMatrix out, void* stream);

// Writes losses [n], the generalised JSD of opd_kernels/divergences.py over whole rows: beta = 0 is
// forward and beta = 1 reverse KL. If upstream [n] is not null, writes upstream * dloss / draw to
// out [n, V], which may be the chunk or another matrix as in opd_gradient.
int opd_divergence(struct OpdMatrix student, struct OpdHead head, struct OpdMatrix teacher,
                   struct OpdHead teacher_head, double beta, const void* upstream, void* losses,
                   struct OpdMatrix out, void* stream);

// sums [n, D] += sparse [n, V] @ dense [V, D]. coefficients [n, k] at ids [n, k] are the entries of
// sparse; ids outside of [0, V) are ignored.
int opd_sparse_product(const int64_t* ids, const void* coefficients, int64_t k,
                       struct OpdMatrix dense, struct OpdMatrix sums, void* stream);

// sums [V, D] += sparse [n, V].T @ dense [n, D]. ids, rows and coefficients, each [entries], are
// the entries of sparse, sorted by id; those outside of the matrix are ignored. partials is scratch
// memory with a row [D] for every OPD_PIECE entries.
int opd_sparse_scatter(const int64_t* ids, const int64_t* rows, const void* coefficients,
                       int64_t entries, struct OpdMatrix dense, struct OpdMatrix sums,
                       void* partials, void* stream);

const char* opd_error(int error);

#ifdef __cplusplus
}
#endif
