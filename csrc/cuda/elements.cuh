// Loads and stores of four dtypes, sixteen bytes at a time, and the launch of a kernel for a dtype.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <limits>
#include <type_traits>

#include "epilogue.h"

namespace opd {

template <typename A>
constexpr A kInfinity = std::numeric_limits<A>::infinity();

// The dtype of logits, sums and losses: float64 for float64 chunks, else float32.
template <typename T>
using Accumulator = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <typename T>
__device__ __forceinline__ Accumulator<T> widened(T x) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>)
    return __bfloat162float(x);
  else if constexpr (std::is_same_v<T, __half>)
    return __half2float(x);
  else
    return x;
}

template <typename T, typename A>
__device__ __forceinline__ T rounded(A x) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>)
    return __float2bfloat16(float(x));
  else if constexpr (std::is_same_v<T, __half>)
    return __float2half(float(x));
  else
    return T(x);
}

// The fewest threads that must fit on a multiprocessor: half of the 2,048 that the larger ones
// hold, so that each thread has 64 registers. float64 is for gradient checks and takes 80
// registers, since some kernels would spill with 64.
template <typename T>
constexpr int kResidentThreads = sizeof(T) == 8 ? 768 : 1024;

// Elements of T in one sixteen-byte access.
template <typename T>
constexpr int kWidth = 16 / sizeof(T);

// Columns that a thread converts from T to O at a time: the larger of the two widths.
template <typename T, typename O>
constexpr int kGroup = kWidth<T> > kWidth<O> ? kWidth<T> : kWidth<O>;

template <typename T>
union Vector {
  uint4 bytes;
  T items[kWidth<T>];
};

template <typename T>
__device__ __forceinline__ void load(const T* from, Accumulator<T>* to) {
  Vector<T> vector;
  vector.bytes = *reinterpret_cast<const uint4*>(from);
#pragma unroll
  for (int i = 0; i < kWidth<T>; ++i) to[i] = widened(vector.items[i]);
}

template <typename T, typename A>
__device__ __forceinline__ void store(const A* from, T* to) {
  Vector<T> vector;
#pragma unroll
  for (int i = 0; i < kWidth<T>; ++i) vector.items[i] = rounded<T>(from[i]);
  *reinterpret_cast<uint4*>(to) = vector.bytes;
}

// The number of elements between this address and the last one aligned to `elements` elements.
template <typename T>
__device__ __forceinline__ int misalignment(const T* address, int elements) {
  return int(reinterpret_cast<uintptr_t>(address) / sizeof(T) % elements);
}

// Read and write columns [first, first + kCount) of a row, sixteen bytes at a time if the address
// is aligned. Columns outside of [0, columns) are read as 0 and are not written.
template <int kCount, typename T>
__device__ __forceinline__ void read_columns(const T* row, int first, int columns,
                                             Accumulator<T>* to) {
  const T* from = row + first;
  if (first >= 0 && first + kCount <= columns && misalignment(from, kWidth<T>) == 0) {
#pragma unroll
    for (int i = 0; i < kCount; i += kWidth<T>) load(from + i, to + i);
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i)
      to[i] = unsigned(first + i) < unsigned(columns) ? widened(from[i]) : Accumulator<T>(0);
  }
}

template <int kCount, typename T, typename A>
__device__ __forceinline__ void write_columns(const A* from, int first, int columns, T* row) {
  T* to = row + first;
  const bool is_whole = first >= 0 && first + kCount <= columns;
  if (is_whole && kCount % kWidth<T> == 0 && misalignment(to, kWidth<T>) == 0) {
#pragma unroll
    for (int i = 0; i + kWidth<T> <= kCount; i += kWidth<T>) store(from + i, to + i);
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i)
      if (unsigned(first + i) < unsigned(columns)) to[i] = rounded<T>(from[i]);
  }
}

// Whether 0 <= index < rows.
__device__ __forceinline__ bool has_row(int64_t rows, int64_t index) {
  return uint64_t(index) < uint64_t(rows);
}

// Calls function(T{}) with the element type T of a dtype.
template <typename Function>
int for_dtype(OpdDtype dtype, const Function& function) {
  switch (dtype) {
    case OPD_FLOAT32:
      return function(float{});
    case OPD_FLOAT64:
      return function(double{});
    case OPD_BFLOAT16:
      return function(__nv_bfloat16{});
    default:
      return function(__half{});
  }
}

// Calls function(T{}, O{}) for a chunk of T whose gradient has dtype O. O is T, or a 16-bit dtype
// for float32 chunks, since the matrix products that follow may take 16 bits.
template <typename Function>
int for_dtypes(OpdDtype chunk, OpdDtype out, const Function& function) {
  return for_dtype(chunk, [&](auto zero) {
    return for_dtype(out, [&](auto out_zero) {
      using T = decltype(zero);
      using O = decltype(out_zero);
      if constexpr (std::is_same_v<T, O> || (std::is_same_v<T, float> && sizeof(O) == 2))
        return function(zero, out_zero);
      else
        return int(cudaErrorInvalidValue);
    });
  });
}

template <typename... Parameters, typename... Arguments>
int launch(void (*kernel)(Parameters...), dim3 grid, int threads, void* stream,
           Arguments... arguments) {
  if (grid.x == 0 || grid.y == 0) return cudaSuccess;  // CUDA refuses empty grids
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.stream = static_cast<cudaStream_t>(stream);
  return cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
}

}  // namespace opd
