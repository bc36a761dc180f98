// The running logsumexp of a row (Milakov and Gimelshein, arXiv 1805.02867), with a first moment.

#pragma once

#include "vector.h"

#include <cmath>

namespace opd {

// total = sum exp(z - max) and weighted = sum exp(z - max) * (z - max), or of any other term that
// has max as its origin. Sums over a block are taken in T, those over blocks here, in double.
template <typename T>
struct OnlineSum {
  double max = -kInfinity<double>, total = 0, weighted = 0;

  // Makes room for logits up to peak; NaN makes the sum NaN.
  void raise(T peak) {
    if (!(peak > max) && peak == peak) return;
    const double decay = max == -kInfinity<double> ? 0 : std::exp(max - peak);
    weighted = max == -kInfinity<double> ? 0 : decay * (weighted + total * (max - peak));
    total *= decay;
    max = peak;
  }

  // What logits are taken relative to: max, or 0 before the first finite one.
  double origin() const { return max == -kInfinity<double> ? 0 : max; }
};

}  // namespace opd
