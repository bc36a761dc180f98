// The epilogues on a chunk of raw products [rows, columns], row-major with a row stride.
#pragma once

#include <cstdint>
#include <vector>

#include "head.h"

namespace opd {

template <typename T>
struct Chunk {
  T* data;
  int64_t rows, columns, stride;
  int64_t first_id;  // of column 0
};

// The state of opd_kernels/backends/state.py; tensors are contiguous, moment may be null.
template <typename T>
struct State {
  T* values;     // [rows, k]
  int64_t* ids;  // [rows, k]
  int64_t k;
  bool selects;
  T *max, *sum, *moment;  // [rows]
};

// Takes the chunk's logits into the state: running top-K or gather, online tail, entropy's moment.
template <typename T>
void update(const Chunk<T>& chunk, const Head<T>& head, const State<T>& state);

// Overwrites the chunk with dL/draw: dvalues [rows, k] at ids [rows, k], dtail [rows] * softmax off
// them.
template <typename T>
void gradient(const Chunk<T>& chunk, const Head<T>& head, const int64_t* ids, const T* dvalues,
              int64_t k, const T* tail, const T* dtail);

template <typename T>
struct Entry {
  int64_t column;
  T value;
};

// What gradient writes, but without the columns off S whose logit is below threshold [rows]: the
// entries of each row in ascending columns. kept [rows] is their share of exp(z - tail) off S.
template <typename T>
std::vector<std::vector<Entry<T>>> filtered_gradient(const Chunk<T>& chunk, const Head<T>& head,
                                                     const int64_t* ids, const T* dvalues,
                                                     int64_t k, const T* tail, const T* dtail,
                                                     const T* threshold, T* kept);

}  // namespace opd
