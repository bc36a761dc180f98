// Elements of four dtypes, sixteen bytes at a time.
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

// Logits, sums and losses are float32 whatever the chunk holds; float64 stays float64.
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

// Threads that a multiprocessor is to hold at least: half of what the larger ones can, so that 64
// registers are left to each. float64, which is there for tests of gradients, takes 80: in 64 some
// kernels would spill.
template <typename T>
constexpr int kResidentThreads = sizeof(T) == 8 ? 768 : 1024;

// What a thread reads or writes at a time: elements of T in one sixteen-byte access.
template <typename T>
constexpr int kWidth = 16 / sizeof(T);

// Columns of a chunk of T that a thread takes to O at a time: a vector of the one with more in it.
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

// How many elements lie between the last address of such an alignment and this one.
template <typename T>
__device__ __forceinline__ int misalignment(const T* address, int elements) {
  return int(reinterpret_cast<uintptr_t>(address) / sizeof(T) % elements);
}

// Columns [first, first + kCount) of a row, of which only [0, columns) exist: the others are 0, and
// are not written. Sixteen bytes at a time where the address allows it.
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

// Whether a matrix of so many rows has one of that index.
__device__ __forceinline__ bool has_row(int64_t rows, int64_t index) {
  return uint64_t(index) < uint64_t(rows);
}

// Calls function(T{}) with the type of a dtype's elements.
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

// Calls function(T{}, O{}) for a chunk of T whose gradient is written as O: the same dtype, or 16
// bits for the matrix products that follow.
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
  if (grid.x == 0 || grid.y == 0) return cudaSuccess;  // nothing to do, which CUDA refuses
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.stream = static_cast<cudaStream_t>(stream);
  return cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
}

}  // namespace opd
