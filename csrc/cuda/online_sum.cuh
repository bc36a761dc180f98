// The running logsumexp of a row (Milakov and Gimelshein, arXiv 1805.02867), with a first moment.
#pragma once

#include "elements.cuh"

namespace opd {

constexpr unsigned kWholeWarp = 0xffffffff;
constexpr int kWarp = 32;

// total = sum exp(z - max) and moment = sum exp(z - max) * (z - max).
template <typename A>
struct OnlineSum {
  A max = -kInfinity<A>, total = 0, moment = 0;

  // The value to subtract from logits: max, or 0 before the first finite logit.
  __device__ __forceinline__ A origin() const { return max == -kInfinity<A> ? A(0) : max; }

  __device__ __forceinline__ void raise(A peak) {
    if (!(peak > max)) return;
    const A gap = max - peak, decay = exp(gap);
    moment = decay == 0 ? A(0) : decay * (moment + total * gap);
    total *= decay;
    max = peak;
  }

  // Adds logits to the total and, if with_moment, to the moment. -inf adds nothing; NaN makes the
  // total NaN.
  template <int kCount>
  __device__ __forceinline__ void absorb(const A (&z)[kCount], bool with_moment) {
    A peak = z[0];
#pragma unroll
    for (int i = 1; i < kCount; ++i) peak = fmax(peak, z[i]);
    raise(peak);
    A sum = 0, products = 0;
    const A shift = origin();
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const A gap = z[i] - shift, weight = exp(gap);
      sum += weight;
      if (with_moment) products += weight == 0 ? A(0) : weight * gap;
    }
    total += sum;
    moment += products;
  }

  __device__ __forceinline__ void merge(const OnlineSum& other) {
    raise(other.max);
    const A gap = other.max - origin(), decay = exp(gap);
    total += other.total * decay;
    moment += decay == 0 ? A(0) : decay * (other.moment + other.total * gap);
  }

  // Merges the sums of a warp into lane 0.
  __device__ __forceinline__ void merge_warp() {
#pragma unroll
    for (int distance = kWarp / 2; distance > 0; distance /= 2)
      merge({__shfl_down_sync(kWholeWarp, max, distance),
             __shfl_down_sync(kWholeWarp, total, distance),
             __shfl_down_sync(kWholeWarp, moment, distance)});
  }
};

}  // namespace opd
