// A language-model head: final logits from raw products hidden @ weight.T, and their derivative.
#pragma once

#include "vector.h"

namespace opd {

// z = outer * tanh(inner * (raw + bias)) if capped, else outer * (raw + bias). Head.factors of
// opd_kernels/backends/records.py computes inner and outer.
template <typename T>
struct Head {
  const T* bias;  // [v] of the chunk's columns, or null
  bool capped;
  T inner, outer;
  T slope;  // dz / draw at a score of 0

  // The slope is multiplied in double, since T(inner) * T(outer) would add two roundings.
  Head(const T* bias, bool capped, double inner, double outer)
      : bias(bias), capped(capped), inner(T(inner)), outer(T(outer)),
        slope(T(capped ? inner * outer : outer)) {}

  Vec<T> score(const T* raw, int64_t column, int64_t count) const {
    const auto score = Vec<T>::loadu(raw + column, count);
    return bias ? score + Vec<T>::loadu(bias + column, count) : score;
  }

  Vec<T> logit(Vec<T> score) const {
    return capped ? (score * Vec<T>(inner)).tanh() * Vec<T>(outer) : score * Vec<T>(outer);
  }

  // dz / draw. 1 - tanh^2 would cancel where the cap saturates, 4 e / (1 + e)^2 does not.
  Vec<T> derivative(Vec<T> score) const {
    if (!capped) return Vec<T>(slope);
    const auto e = exp((score * Vec<T>(inner)).abs() * Vec<T>(-2));
    const auto sum = e + Vec<T>(1);
    return Vec<T>(4 * slope) * e / (sum * sum);
  }

  T derivative_at(const T* raw, int64_t column) const {
    if (!capped) return slope;
    const T score = raw[column] + (bias ? bias[column] : T(0));
    const T e = std::exp(-2 * std::abs(score * inner));
    return 4 * slope * e / ((1 + e) * (1 + e));
  }

  // Writes the logits of columns [first, first + count) to z, padded with -inf to whole vectors.
  // Returns their maximum, or NaN if any logit is NaN.
  T logits(const T* raw, int64_t first, int64_t count, T* z) const {
    constexpr int64_t width = Vec<T>::size();
    Vec<T> peak(-kInfinity<T>);
    int64_t i = 0;
    for (; i + width <= count; i += width) {
      const auto logit = this->logit(score(raw, first + i, width));
      logit.store(z + i);
      peak = at::vec::maximum(peak, logit);
    }
    if (i < count) {
      const auto logit = this->logit(score(raw, first + i, count - i));
      const auto rest = Vec<T>::set(Vec<T>(-kInfinity<T>), logit, count - i);
      rest.store(z + i);
      peak = at::vec::maximum(peak, rest);
    }
    return max_of(peak);
  }
};

}  // namespace opd
