// Helpers for at::vec vectors and for blocks of a row.
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

// Elements of a block. 2 KiB of float32 stay in the L1 cache for the passes after the first.
constexpr int64_t kBlock = 512;

// The count rounded up to whole vectors.
template <typename T>
constexpr int64_t padded(int64_t count) {
  return (count + Vec<T>::size() - 1) / Vec<T>::size() * Vec<T>::size();
}

// exp(r) for x = r + n log 2 with |r| <= log(2) / 2, so that exp(x) = exp(r) * 2^n. The
// coefficients are those of Cephes' expf.
inline Vec<float> exp_of_remainder(Vec<float> x, Vec<float> n) {
  auto r = at::vec::fmadd(n, Vec<float>(-0.693359375f), x);
  r = at::vec::fmadd(n, Vec<float>(2.12194440e-4f), r);
  auto p = Vec<float>(1.9875691500e-4f);
  p = at::vec::fmadd(p, r, Vec<float>(1.3981999507e-3f));
  p = at::vec::fmadd(p, r, Vec<float>(8.3334519073e-3f));
  p = at::vec::fmadd(p, r, Vec<float>(4.1665795894e-2f));
  p = at::vec::fmadd(p, r, Vec<float>(1.6666665459e-1f));
  p = at::vec::fmadd(p, r, Vec<float>(5.0000001201e-1f));
  return at::vec::fmadd(p, r * r, r + Vec<float>(1.0f));
}

// exp(x) within 2 ulp. It is inlined, because a library call for every vector costs more than the
// polynomial. Subnormal results, below x = -87.34, are 0. Without AVX-512 the result is infinite
// from 88.38 on instead of 88.73. NaN stays NaN.
inline Vec<float> exp(Vec<float> x) {
  constexpr float lowest = -87.33654f, highest = 89.0f, log2_of_e = 1.44269504088896341f;
#if defined(CPU_CAPABILITY_AVX512)
  // The comparisons, shifts and NaN-propagating extrema of at::vec take several instructions each
  // on AVX-512. This minimum returns its second operand if one is NaN, so x = NaN stays NaN.
  const auto kept = _mm512_cmp_ps_mask(x, _mm512_set1_ps(lowest), _CMP_NLT_UQ);
  const Vec<float> clamped = _mm512_maskz_min_ps(kept, _mm512_set1_ps(highest), x);
  const Vec<float> n = (clamped * Vec<float>(log2_of_e)).round();
  return _mm512_maskz_scalef_ps(kept, exp_of_remainder(clamped, n), n);
#else
  const auto clamped =
      at::vec::minimum(at::vec::maximum(x, Vec<float>(lowest)), Vec<float>(highest));
  const auto n = (clamped * Vec<float>(log2_of_e)).round();
  const auto p = exp_of_remainder(clamped, n);
  const auto exponent = at::vec::convert_to_int_of_same_size(n) + Vec<int32_t>(127);
  const auto power = at::vec::cast<float, int32_t>(exponent << Vec<int32_t>(23));
  return Vec<float>::blendv(p * power, Vec<float>(0.0f), x < Vec<float>(lowest));
#endif
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
