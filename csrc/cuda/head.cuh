// A language-model head: final logits from raw products hidden @ weight.T, and their derivative.
#pragma once

#include "elements.cuh"

namespace opd {

// OpdHead in the accumulator dtype A.
template <typename A>
struct Head {
  const A* bias;
  bool capped;
  A inner, outer;

  explicit Head(const OpdHead& head)
      : bias(static_cast<const A*>(head.bias)), capped(head.capped), inner(A(head.inner)),
        outer(A(head.outer)) {}

  __device__ __forceinline__ bool is_plain() const { return !bias && !capped; }

  __device__ __forceinline__ A score(A raw, int column) const {
    return bias ? raw + bias[column] : raw;
  }

  __device__ __forceinline__ A logit(A score) const {
    return capped ? tanh(score * inner) * outer : score * outer;
  }

  // dz / dscore. 1 - tanh^2 would cancel where the cap saturates, 4 e / (1 + e)^2 does not.
  __device__ __forceinline__ A derivative(A score) const {
    if (!capped) return outer;
    const A e = exp(A(-2) * fabs(score * inner));
    return A(4) * inner * outer * e / ((1 + e) * (1 + e));
  }
};

}  // namespace opd
