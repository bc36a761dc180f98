// The epilogues on a chunk of raw products hidden @ weight.T [rows, columns].
#pragma once

#include <cstdint>
#include <vector>

#include "head.h"

namespace opd {

template <typename T>
struct Chunk {
  T* data;  // row-major
  int64_t rows, columns, stride;
  int64_t first_id;  // the token id of column 0
};

// RowState of opd_kernels/backends/records.py. The arrays are contiguous; moment may be null.
template <typename T>
struct State {
  T* values;     // [rows, k]
  int64_t* ids;  // [rows, k]
  int64_t k;
  bool selects;
  T *max, *sum, *moment;  // [rows]
};

// Adds the chunk's logits to the state. If state.selects, the state's values and ids are the
// running top-K; else the values of the given ids are gathered. The other logits go to the running
// logsumexp of the tail and, if moment is not null, to the first moment for the entropy.
template <typename T>
void update(const Chunk<T>& chunk, const Head<T>& head, const State<T>& state);

// Overwrites the chunk with dL / draw. dL / dz is dvalues [rows, k] at ids [rows, k], and
// dtail [rows] * exp(z - tail [rows]) in all other columns.
template <typename T>
void gradient(const Chunk<T>& chunk, const Head<T>& head, const int64_t* ids, const T* dvalues,
              int64_t k, const T* tail, const T* dtail);

template <typename T>
struct Entry {
  int64_t column;
  T value;
};

// Returns the entries of the gradient for each row, sorted by column; the chunk is not changed.
// Columns outside of ids are left out if their logit is below threshold [rows]. kept [rows]
// receives the sum of exp(z - tail) over the columns outside of ids that are not left out.
template <typename T>
std::vector<std::vector<Entry<T>>> filtered_gradient(const Chunk<T>& chunk, const Head<T>& head,
                                                     const int64_t* ids, const T* dvalues,
                                                     int64_t k, const T* tail, const T* dtail,
                                                     const T* threshold, T* kept);

}  // namespace opd
