// The launchers as plain C: pointers, sizes, strides and a stream, so that neither PyTorch nor CUDA
// has to be known to both sides. Each returns a cudaError_t, 0 for success, and only queues its work.
//
// All tensors but chunks, `out` and the dense operands of the sparse products are contiguous. The
// accumulator dtype is float64 for float64 chunks, else float32.
#pragma once

#include <stdint.h>

#define OPD_MAX_SELECTED 256  // K of a state that selects
#define OPD_MAX_GIVEN 512     // K of given ids
#define OPD_PIECE 64          // entries of a sparse matrix that share a row of partial sums

// Columns are counted in int, and a grid has 65,535 blocks for their spans.
#define OPD_MAX_COLUMNS (1 << 28)  // of a chunk, and ids of a vocabulary
#define OPD_MAX_DIM (1 << 22)      // columns of a dense operand

#ifdef __cplusplus
extern "C" {
#endif

enum OpdDtype { OPD_FLOAT32, OPD_FLOAT64, OPD_BFLOAT16, OPD_FLOAT16 };

// Rows of a matrix [rows, columns], their elements side by side.
struct OpdMatrix {
  void* data;
  enum OpdDtype dtype;
  int64_t rows, columns, stride;
};

// z = outer * tanh(inner * (raw + bias)), or outer * (raw + bias) where it is not capped.
struct OpdHead {
  const void* bias;  // [v] of the chunk's columns in the accumulator dtype, or null
  int capped;
  double inner, outer;
};

// opd_kernels/backends/state.py, in the accumulator dtype; moments may be null.
struct OpdState {
  void* values;  // [n, k]
  int64_t* ids;  // [n, k]
  int64_t k;
  int selects;
  void *maxima, *sums, *moments;  // [n]
};

// Takes a chunk's logits into the state: running top-K or gather, online tail, entropy's moment.
// A row is walked by one warp, or by a whole block.
int opd_update(struct OpdMatrix chunk, int64_t first_id, struct OpdHead head,
               struct OpdState state, int block_per_row, void* stream);

// Writes dL/draw to out [n, v]: the chunk or one of its dtype, or 16 bits for a float32 chunk. dvalues
// dtails [n] * exp(z - tails [n]) elsewhere.
int opd_gradient(struct OpdMatrix chunk, int64_t first_id, struct OpdHead head,
                 const int64_t* ids, const void* dvalues, int64_t k, const void* tails,
                 const void* dtails, struct OpdMatrix out, void* stream);

// losses [n] of whole rows, as divergence in opd_kernels/backends/torch.py defines them, from 0 for
// the forward to 1 for the reverse KL. Given upstream [n], upstream * dloss/draw is written to out
// [n, V], as opd_gradient does.
int opd_divergence(struct OpdMatrix student, struct OpdHead head, struct OpdMatrix teacher,
                   struct OpdHead teacher_head, double beta, const void* upstream, void* losses,
                   struct OpdMatrix out, void* stream);

// sums [n, D] += coefficients [n, k] at ids [n, k] of an [n, V] matrix @ dense [V, D]. A slot whose id
// is outside [0, V) is empty.
int opd_sparse_product(const int64_t* ids, const void* coefficients, int64_t k,
                       struct OpdMatrix dense, struct OpdMatrix sums, void* stream);

// sums [V, D] += the transposed matrix @ dense [n, D], given its entries in the order of their ids:
// ids, rows and coefficients, each [entries]; one outside of the matrix is left out. partials has a
// row [D] for every OPD_PIECE of them.
int opd_sparse_scatter(const int64_t* ids, const int64_t* rows, const void* coefficients,
                       int64_t entries, struct OpdMatrix dense, struct OpdMatrix sums,
                       void* partials, void* stream);

const char* opd_error(int error);

#ifdef __cplusplus
}
#endif
