// Divergences of whole rows, over all of V, with student and teacher chunks side by side.
#pragma once

#include "epilogue.h"

namespace opd {

// The generalised JSD of opd_kernels/divergences.py: beta = 0 is forward and beta = 1 reverse KL.
// loss [rows]; if upstream [rows] is not null, student becomes upstream * dloss / draw.
template <typename T>
void divergence(const Chunk<T>& student, const Head<T>& head, const Chunk<T>& teacher,
                const Head<T>& teacher_head, double beta, const T* upstream, T* loss);

}  // namespace opd
