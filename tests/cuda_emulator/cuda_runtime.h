// The subset of CUDA that csrc/cuda uses, for g++: the threads of a block are fibers of one CPU
// thread.
//
// A fiber runs until it waits at a barrier or for the other lanes of its warp. The next fiber is
// drawn at random from a seed (OPD_EMULATOR_SEED), so that a write and a read of two threads happen
// in any order unless a barrier separates them. Shared memory is NaN when a block starts. The
// process ends if not all threads reach a barrier, or not all lanes of the mask reach an operation
// of a warp.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <utility>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
// A separate section, so that shared memory can be filled with NaN before each block. One block
// runs at a time.
#define __shared__ static __attribute__((section("opd_shared")))

using std::exp;
using std::fabs;
using std::fmax;
using std::log;
using std::max;
using std::min;
using std::tanh;

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

using cudaStream_t = struct CudaStream*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  cudaStream_t stream = nullptr;
};
inline const char* cudaGetErrorString(cudaError_t error) {
  if (error == cudaErrorInvalidValue) return "invalid argument";
  return error == cudaSuccess ? "no error" : "invalid configuration argument";
}

// Those of the running fiber.
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

using Body = void (*)(void* arguments);
cudaError_t run_grid(const cudaLaunchConfig_t& config, Body body, void* arguments);

// Waits for all threads of the block.
void synchronize_block();

// Waits for the lanes of the mask and returns the value that each passed [32].
const uint64_t* exchange(unsigned mask, uint64_t value, const char* operation);

unsigned lane();

template <typename T>
uint64_t packed(T value) {
  static_assert(sizeof(T) <= 8);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  return bits;
}

template <typename T>
T unpacked(uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace emulator

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  auto call = std::make_pair(kernel, std::tuple<Parameters...>(arguments...));
  const auto body = [](void* opaque) {
    const auto& [function, values] = *static_cast<decltype(call)*>(opaque);
    std::apply(function, values);
  };
  return emulator::run_grid(*config, body, &call);
}

inline void __syncthreads() { emulator::synchronize_block(); }
inline void __syncwarp(unsigned mask = ~0u) { emulator::exchange(mask, 0, "__syncwarp"); }

inline unsigned __ballot_sync(unsigned mask, int predicate) {
  const uint64_t* values = emulator::exchange(mask, predicate != 0, "__ballot_sync");
  unsigned ballot = 0;
  for (unsigned i = 0; i < 32; ++i)
    if (mask >> i & 1 && values[i]) ballot |= 1u << i;
  return ballot;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }

template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned distance) {
  const uint64_t* values = emulator::exchange(mask, emulator::packed(value), "__shfl_down_sync");
  const unsigned from = emulator::lane() + distance;
  return emulator::unpacked<T>(values[from < 32 ? from : emulator::lane()]);
}

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
