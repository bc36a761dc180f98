// From raw products hidden @ weight.T to final logits and back, block by block.
#pragma once

#include "vector.h"

namespace opd {

// z = softcap(scale * (raw + bias)) / temperature, as opd_kernels/backends/head.py defines it.
template <typename T>
struct Head {
  const T* bias;  // [v] of the chunk's columns, or null
  bool capped;
  T factor;  // scale / temperature
  T inner;   // scale / softcap
  T outer;   // softcap / temperature

  Vec<T> score(const T* raw, int64_t column, int64_t count) const {
    const auto score = Vec<T>::loadu(raw + column, count);
    return bias ? score + Vec<T>::loadu(bias + column, count) : score;
  }

  Vec<T> logit(Vec<T> score) const {
    return capped ? (score * Vec<T>(inner)).tanh() * Vec<T>(outer) : score * Vec<T>(factor);
  }

  // dz / draw. 1 - tanh^2 cancels where the cap saturates; 4 e / (1 + e)^2 does not.
  Vec<T> derivative(Vec<T> score) const {
    if (!capped) return Vec<T>(factor);
    const auto e = exp((score * Vec<T>(inner)).abs() * Vec<T>(-2));
    const auto sum = e + Vec<T>(1);
    return Vec<T>(4 * factor) * e / (sum * sum);
  }

  T derivative_at(const T* raw, int64_t column) const {
    if (!capped) return factor;
    const T score = raw[column] + (bias ? bias[column] : T(0));
    const T e = std::exp(-2 * std::abs(score * inner));
    return 4 * factor * e / ((1 + e) * (1 + e));
  }

  // Logits of columns [first, first + count) into z, padded with -inf to whole vectors; their
  // maximum, or NaN if there is one.
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
