// Matrix products with a head's weight. Each thread upcasts and multiplies its own slices of it.
#pragma once

#include <cstdint>

namespace opd {

// A row-major matrix whose row stride is at least its number of columns.
template <typename T>
struct Matrix {
  T* data;
  int64_t rows, columns, stride;

  Matrix part(int64_t row, int64_t count, int64_t column, int64_t width) const {
    return {data + row * stride + column, count, width, stride};
  }
};

// out [n, v] = hidden [n, D] @ weight [v, D].T, with slices of up to slice_rows rows of the weight.
template <typename T, typename W>
void project(const Matrix<const T>& hidden, const Matrix<const W>& weight, const Matrix<T>& out,
             int64_t slice_rows);

// dhidden [n, D] += dlogits [n, v] @ weight [v, D], with slices of up to slice_rows rows of it.
template <typename T, typename W>
void add_hidden_gradient(const Matrix<T>& dhidden, const Matrix<const T>& dlogits,
                         const Matrix<const W>& weight, int64_t slice_rows);

}  // namespace opd
