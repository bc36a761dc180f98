// The rows of a chunk, which a warp reads in tiles of a few sixteen-byte vectors per lane.
#pragma once

#include "head.cuh"
#include "online_sum.cuh"

namespace opd {

__device__ __forceinline__ int lane_id() { return threadIdx.x % kWarp; }

// A row that may begin and end inside a sixteen-byte vector.
template <typename T>
struct Row {
  const T* raw;
  int columns;
  int shift;  // elements before column 0 in the first vector

  __device__ Row(const T* raw, int columns)
      : raw(raw), columns(columns), shift(misalignment(raw, kWidth<T>)) {}

  __device__ __forceinline__ int count() const {
    return (shift + columns + kWidth<T> - 1) / kWidth<T>;
  }

  // The column of a vector's first element, negative if it is before the row.
  __device__ __forceinline__ int column(int vector) const { return vector * kWidth<T> - shift; }

  __device__ __forceinline__ bool has(int column) const {
    return unsigned(column) < unsigned(columns);
  }
};

// The logits of kVectors vectors for each lane of a warp. The v-th vectors of all lanes are
// adjacent in memory. Elements outside of the row are -inf.
template <typename T>
class Tile {
  using A = Accumulator<T>;

 public:
  static constexpr int kElements = sizeof(A) == 8 ? 2 : 8,
                       kVectors = kElements / kWidth<T>;

  A z[kElements];

  __device__ __forceinline__ Tile(const Row<T>& row, const Head<A>& head, int index)
      : first_column_(row.column(index * kVectors * kWarp)) {
#pragma unroll
    for (int v = 0; v < kVectors; ++v)
      read_columns<kWidth<T>>(row.raw, column(v * kWidth<T>), row.columns, z + v * kWidth<T>);
    if (head.is_plain()) {  // one branch for a tile instead of one for each logit
#pragma unroll
      for (int i = 0; i < kElements; ++i) z[i] *= head.outer;
    } else {
#pragma unroll
      for (int i = 0; i < kElements; ++i)
        if (row.has(column(i))) z[i] = head.logit(head.score(z[i], column(i)));
    }
    if (begin() >= 0 && end() <= row.columns) return;
#pragma unroll
    for (int i = 0; i < kElements; ++i)
      if (!row.has(column(i))) z[i] = -kInfinity<A>;
  }

  static __device__ __forceinline__ int count(const Row<T>& row) {
    return (row.count() + kVectors * kWarp - 1) / (kVectors * kWarp);
  }

  // The column of this lane's i-th logit.
  __device__ __forceinline__ int column(int i) const {
    return first_column_ + (i / kWidth<T> * kWarp + lane_id()) * kWidth<T> + i % kWidth<T>;
  }

  __device__ __forceinline__ int begin() const { return first_column_; }
  __device__ __forceinline__ int end() const { return first_column_ + kElements * kWarp; }

  __device__ __forceinline__ A peak() const {
    A peak = z[0];
#pragma unroll
    for (int i = 1; i < kElements; ++i) peak = fmax(peak, z[i]);
    return peak;
  }

 private:
  int first_column_;
};

}  // namespace opd
