// The divergence between student and teacher over the whole vocabulary.
#pragma once

#include "epilogue.h"

namespace opd {

// The generalised JSD of opd_kernels/divergences.py: beta = 0 is forward and beta = 1 reverse KL.
// Writes loss [rows]. If upstream [rows] is not null, overwrites student with
// upstream * dloss / draw.
template <typename T>
void divergence(const Chunk<T>& student, const Head<T>& head, const Chunk<T>& teacher,
                const Head<T>& teacher_head, double beta, const T* upstream, T* loss);

}  // namespace opd
