// Vector helpers on at::vec: one block of a row at a time, in a buffer that stays in the L1 cache.
#pragma once

#include <ATen/cpu/vec/vec.h>

#include <cmath>
#include <cstdint>
#include <limits>

namespace opd {

template <typename T>
using Vec = at::vec::Vectorized<T>;

template <typename T>
constexpr T kInfinity = std::numeric_limits<T>::infinity();

// Elements of a block: 2 KiB of float, so that a block's passes after the first hit the L1 cache.
constexpr int64_t kBlock = 512;

template <typename T>
constexpr int64_t padded(int64_t count) {
  return (count + Vec<T>::size() - 1) / Vec<T>::size() * Vec<T>::size();
}

// exp(x), inlined: a library call for every vector costs more than the polynomial. Coefficients of
// Cephes' expf; 2 ulp. Below -87.3 the result is 0 where it would be subnormal. NaN stays NaN.
inline Vec<float> exp(Vec<float> x) {
  const Vec<float> lowest(-87.3f);
  const auto clamped = at::vec::minimum(at::vec::maximum(x, lowest), Vec<float>(88.3f));
  const auto n = (clamped * Vec<float>(1.44269504088896341f)).round();
  auto r = at::vec::fmadd(n, Vec<float>(-0.693359375f), clamped);
  r = at::vec::fmadd(n, Vec<float>(2.12194440e-4f), r);
  auto p = Vec<float>(1.9875691500e-4f);
  p = at::vec::fmadd(p, r, Vec<float>(1.3981999507e-3f));
  p = at::vec::fmadd(p, r, Vec<float>(8.3334519073e-3f));
  p = at::vec::fmadd(p, r, Vec<float>(4.1665795894e-2f));
  p = at::vec::fmadd(p, r, Vec<float>(1.6666665459e-1f));
  p = at::vec::fmadd(p, r, Vec<float>(5.0000001201e-1f));
  p = at::vec::fmadd(p, r * r, r + Vec<float>(1.0f));
  const auto exponent = at::vec::convert_to_int_of_same_size(n) + Vec<int32_t>(127);
  const auto power = at::vec::cast<float, int32_t>(exponent << Vec<int32_t>(23));
  return Vec<float>::blendv(p * power, Vec<float>(0.0f), x < lowest);
}

inline Vec<double> exp(Vec<double> x) { return x.exp(); }

template <typename T>
T sum_of(Vec<T> v) {
  T lanes[Vec<T>::size()];
  v.store(lanes);
  T total = 0;
  for (T lane : lanes) total += lane;
  return total;
}

template <typename T>
T max_of(Vec<T> v) {
  T lanes[Vec<T>::size()];
  v.store(lanes);
  T peak = lanes[0];
  for (T lane : lanes) peak = lane > peak || lane != lane ? lane : peak;
  return peak;
}

template <typename T>
T max_of(const T* z, int64_t count) {
  Vec<T> peak(-kInfinity<T>);
  for (int64_t i = 0; i < padded<T>(count); i += Vec<T>::size())
    peak = at::vec::maximum(peak, Vec<T>::loadu(z + i));
  return max_of(peak);
}

}  // namespace opd
