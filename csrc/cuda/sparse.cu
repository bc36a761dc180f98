// The backward pass of a loss that does not use the tail: two products with a sparse matrix [n, V]
// that has k entries in each row.
//
// dhidden gathers n * k rows of the weight. dweight is a scatter. Its entries are sorted by id, so
// a run of equal ids contributes to one row of dweight. Each block processes a piece of OPD_PIECE
// entries. The piece in which a run starts owns the row and adds to it. A piece in which a run
// continues writes its sum to `partials`, and combine_kernel adds these to the row afterwards.
// There are no atomics, and the order of every sum is fixed.

#include "elements.cuh"

namespace opd {
namespace {

constexpr int kThreads = 128;

template <typename T, int kColumns>
__device__ __forceinline__ void read(const T* from, Accumulator<T>* to) {
  if constexpr (kColumns == 1)
    to[0] = widened(*from);
  else
    load(from, to);
}

template <int kColumns, typename A>
__device__ __forceinline__ void add(A* sums, const A* terms) {
#pragma unroll
  for (int i = 0; i < kColumns; ++i) sums[i] += terms[i];
}

template <typename T, int kColumns>
__global__ void __launch_bounds__(kThreads)
    product_kernel(const int64_t* ids, const Accumulator<T>* coefficients, int k, const T* dense,
                   int64_t dense_rows, int64_t dense_stride, int columns, Accumulator<T>* sums,
                   int64_t sums_stride) {
  using A = Accumulator<T>;
  const int64_t row = blockIdx.x;
  const int first = (blockIdx.y * kThreads + threadIdx.x) * kColumns;
  if (first >= columns) return;
  A total[kColumns] = {};
  for (int slot = 0; slot < k; ++slot) {
    const int64_t id = ids[row * k + slot];
    if (!has_row(dense_rows, id)) continue;
    const A coefficient = coefficients[row * k + slot];
    A terms[kColumns];
    read<T, kColumns>(dense + id * dense_stride + first, terms);
#pragma unroll
    for (int i = 0; i < kColumns; ++i) total[i] += coefficient * terms[i];
  }
  add<kColumns>(sums + row * sums_stride + first, total);
}

template <typename T, int kColumns>
__global__ void __launch_bounds__(kThreads)
    scatter_kernel(const int64_t* ids, const int64_t* rows, const Accumulator<T>* coefficients,
                   int64_t entries, const T* dense, int64_t dense_rows, int64_t dense_stride,
                   int columns, Accumulator<T>* sums, int64_t sums_rows, int64_t sums_stride,
                   Accumulator<T>* partials) {
  using A = Accumulator<T>;
  const int64_t begin = int64_t(blockIdx.x) * OPD_PIECE;
  const int64_t end = min(begin + OPD_PIECE, entries);
  const int first = (blockIdx.y * kThreads + threadIdx.x) * kColumns;
  if (first >= columns) return;
  bool is_owner = begin == 0 || ids[begin - 1] != ids[begin];
  A total[kColumns] = {};
  for (int64_t entry = begin; entry < end; ++entry) {
    const int64_t id = ids[entry];
    const bool is_row = has_row(sums_rows, id);
    if (is_row && has_row(dense_rows, rows[entry])) {
      A terms[kColumns];
      read<T, kColumns>(dense + rows[entry] * dense_stride + first, terms);
#pragma unroll
      for (int i = 0; i < kColumns; ++i) total[i] += coefficients[entry] * terms[i];
    }
    if (entry + 1 < end && ids[entry + 1] == id) continue;
    A* partial = partials + blockIdx.x * int64_t(columns) + first;
    if (is_row && is_owner) {
      add<kColumns>(sums + id * sums_stride + first, total);
    } else if (is_row) {
#pragma unroll
      for (int i = 0; i < kColumns; ++i) partial[i] = total[i];
    }
    is_owner = true;  // the next run starts in this piece
#pragma unroll
    for (int i = 0; i < kColumns; ++i) total[i] = 0;
  }
}

// The block of the piece that owns a run adds the partial sums of the pieces that follow in the
// run.
template <typename A>
__global__ void __launch_bounds__(kThreads)
    combine_kernel(const int64_t* ids, int64_t entries, const A* partials, int columns, A* sums,
                   int64_t sums_rows, int64_t sums_stride) {
  const int64_t begin = int64_t(blockIdx.x) * OPD_PIECE, next = begin + OPD_PIECE;
  const int column = blockIdx.y * kThreads + threadIdx.x;
  if (next >= entries || column >= columns) return;
  const int64_t id = ids[next - 1];
  const bool starts_here = begin == 0 || ids[begin] != id || ids[begin - 1] != id;
  if (!has_row(sums_rows, id) || ids[next] != id || !starts_here) return;
  A total = 0;
  for (int64_t piece = next; piece < entries && ids[piece] == id; piece += OPD_PIECE)
    total += partials[piece / OPD_PIECE * columns + column];
  sums[id * sums_stride + column] += total;
}

unsigned ceiling(int64_t a, int64_t b) { return unsigned((a + b - 1) / b); }

// Whether every row of a matrix starts and ends at a sixteen-byte boundary.
template <typename T>
bool is_aligned(const OpdMatrix& matrix) {
  return reinterpret_cast<uintptr_t>(matrix.data) % 16 == 0 &&
         matrix.stride % kWidth<T> == 0 && matrix.columns % kWidth<T> == 0;
}

template <typename T, int kColumns>
int product(const int64_t* ids, const void* coefficients, int64_t k, const OpdMatrix& dense,
            const OpdMatrix& sums, void* stream) {
  using A = Accumulator<T>;
  const dim3 grid(unsigned(sums.rows), ceiling(sums.columns, kThreads * kColumns));
  return launch(product_kernel<T, kColumns>, grid, kThreads, stream, ids,
                static_cast<const A*>(coefficients), k, static_cast<const T*>(dense.data),
                dense.rows, dense.stride, dense.columns, static_cast<A*>(sums.data), sums.stride);
}

template <typename T, int kColumns>
int scatter(const int64_t* ids, const int64_t* rows, const void* coefficients, int64_t entries,
            const OpdMatrix& dense, const OpdMatrix& sums, void* partials, void* stream) {
  using A = Accumulator<T>;
  const unsigned pieces = ceiling(entries, OPD_PIECE);
  const dim3 grid(pieces, ceiling(sums.columns, kThreads * kColumns));
  const int error = launch(
      scatter_kernel<T, kColumns>, grid, kThreads, stream, ids, rows,
      static_cast<const A*>(coefficients), entries, static_cast<const T*>(dense.data), dense.rows,
      dense.stride, dense.columns, static_cast<A*>(sums.data), sums.rows, sums.stride,
      static_cast<A*>(partials));
  if (error != cudaSuccess) return error;
  const dim3 combine_grid(pieces, ceiling(sums.columns, kThreads));
  return launch(combine_kernel<A>, combine_grid, kThreads, stream, ids, entries,
                static_cast<const A*>(partials), dense.columns, static_cast<A*>(sums.data),
                sums.rows, sums.stride);
}

}  // namespace
}  // namespace opd

int opd_sparse_product(const int64_t* ids, const void* coefficients, int64_t k, OpdMatrix dense,
                       OpdMatrix sums, void* stream) {
  return opd::for_dtype(dense.dtype, [&](auto zero) {
    using T = decltype(zero);
    const auto run = opd::is_aligned<T>(dense) ? opd::product<T, opd::kWidth<T>>
                                               : opd::product<T, 1>;
    return run(ids, coefficients, k, dense, sums, stream);
  });
}

int opd_sparse_scatter(const int64_t* ids, const int64_t* rows, const void* coefficients,
                       int64_t entries, OpdMatrix dense, OpdMatrix sums, void* partials,
                       void* stream) {
  return opd::for_dtype(dense.dtype, [&](auto zero) {
    using T = decltype(zero);
    const auto run = opd::is_aligned<T>(dense) ? opd::scatter<T, opd::kWidth<T>>
                                               : opd::scatter<T, 1>;
    return run(ids, rows, coefficients, entries, dense, sums, partials, stream);
  });
}
