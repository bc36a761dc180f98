// The running logsumexp of a row (Milakov and Gimelshein, arXiv 1805.02867), with a first moment.

#pragma once

#include "vector.h"

#include <cmath>

namespace opd {

// total = sum exp(z - max). weighted = sum exp(z - max) * (z - max), or the same sum of another
// term that is relative to max. Callers sum within a block in T; sums over blocks are double.
template <typename T>
struct OnlineSum {
  double max = -kInfinity<double>, total = 0, weighted = 0;

  // Rescales the sums for logits up to peak. A NaN peak makes them NaN.
  void raise(T peak) {
    if (!(peak > max) && peak == peak) return;
    const double decay = max == -kInfinity<double> ? 0 : std::exp(max - peak);
    weighted = max == -kInfinity<double> ? 0 : decay * (weighted + total * (max - peak));
    total *= decay;
    max = peak;
  }

  // The value to subtract from logits: max, or 0 before the first finite logit.
  double origin() const { return max == -kInfinity<double> ? 0 : max; }
};

}  // namespace opd
