// Each thread upcasts a slice and multiplies it with PyTorch's product on this one thread. If
// another thread upcast the slice, it would be read line by line from that core's cache; if all
// threads shared each product, they would all wait at its end for the slowest.

#include "products.h"

#include <ATen/Parallel.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/ops/addmm_cpu_dispatch.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/mm_cpu_dispatch.h>
#include <c10/core/CPUAllocator.h>

#include <algorithm>
#include <type_traits>

#include "vector.h"

namespace opd {
namespace {

// The columns of each thread, in logits or in dhidden, start at a multiple of this, aligned for
// vectors.
constexpr int64_t kAlignment = 16;
// The fewest columns of dhidden and tokens for a thread. Each thread packs dlogits, which costs too
// much for fewer columns, and the weight, which costs too much for fewer tokens. For two or three
// tokens MKL also adds long chains of terms (docs/log.md).
constexpr int64_t kMinColumns = 128, kMinTokens = 32;

int64_t ceil_div(int64_t total, int64_t by) { return (total + by - 1) / by; }

// The number of columns for each thread.
int64_t share_of(int64_t columns) {
  return ceil_div(ceil_div(columns, at::get_num_threads()), kAlignment) * kAlignment;
}

// Returns a view. It bypasses the dispatcher, whose modes and guards exist in the calling thread
// only.
template <typename T>
at::Tensor tensor_of(const Matrix<T>& matrix, bool transposed = false) {
  using Element = std::remove_const_t<T>;
  const auto options = at::TensorOptions().dtype(c10::CppTypeToScalarType<Element>::value);
  const auto& [data, rows, columns, stride] = matrix;
  auto* memory = const_cast<Element*>(data);
  return transposed ? at::from_blob(memory, {columns, rows}, {1, stride}, options)
                    : at::from_blob(memory, {rows, columns}, {stride, 1}, options);
}

template <typename T, typename W>
void upcast(const W* from, T* to, int64_t count) {
  int64_t i = 0;
  if constexpr (std::is_same_v<T, float> && c10::is_reduced_floating_point_v<W>) {
    for (; i + Vec<T>::size() <= count; i += Vec<T>::size()) {
      Vec<T> wide;
      at::vec::load_to_float<W>(from + i, wide);
      wide.store(to + i);
    }
  }
  for (; i < count; ++i) to[i] = static_cast<T>(from[i]);
}

// The rows of a weight in dtype T, a slice at a time: views, or upcast copies in one buffer, so
// that a slice is valid until the next one.
template <typename T, typename W>
class Slices {
 public:
  Slices(const Matrix<const W>& weight, int64_t max_rows)
      : weight_(weight), rows_(std::min(max_rows, weight.rows)) {
    if constexpr (!std::is_same_v<T, W>)
      buffer_ = c10::GetCPUAllocator()->allocate(rows_ * weight.columns * sizeof(T));
  }

  int64_t rows() const { return rows_; }

  Matrix<const T> from(int64_t row) const {
    const auto slice = weight_.part(row, std::min(rows_, weight_.rows - row), 0, weight_.columns);
    if constexpr (std::is_same_v<T, W>) {
      return slice;
    } else {
      T* data = static_cast<T*>(buffer_.get());
      for (int64_t i = 0; i < slice.rows; ++i)
        upcast(slice.data + i * slice.stride, data + i * slice.columns, slice.columns);
      return {data, slice.rows, slice.columns, slice.columns};
    }
  }

 private:
  Matrix<const W> weight_;
  int64_t rows_;
  at::DataPtr buffer_;
};

}  // namespace

template <typename T, typename W>
void project(const Matrix<const T>& hidden, const Matrix<const W>& weight, const Matrix<T>& out,
             int64_t slice_rows) {
  const int64_t share = share_of(weight.rows);
  at::parallel_for(0, ceil_div(weight.rows, share), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i * share, rows = std::min(share, weight.rows - first);
      const Slices<T, W> slices(weight.part(first, rows, 0, weight.columns), slice_rows);
      for (int64_t row = 0; row < rows; row += slices.rows()) {
        const auto slice = slices.from(row);
        auto product = tensor_of(out.part(0, out.rows, first + row, slice.rows));
        at::cpu::mm_out(product, tensor_of(hidden), tensor_of(slice, true));
      }
    }
  });
}

template <typename T, typename W>
void add_hidden_gradient(const Matrix<T>& dhidden, const Matrix<const T>& dlogits,
                         const Matrix<const W>& weight, int64_t slice_rows) {
  // dhidden is divided by columns, and also by tokens if there are more threads than column blocks.
  const int64_t max_columns = std::max(kMinColumns, share_of(weight.columns));
  const int64_t across = ceil_div(weight.columns, max_columns), tokens = dhidden.rows;
  const int64_t max_down = std::min(at::get_num_threads() / across, tokens / kMinTokens);
  const int64_t down = std::max<int64_t>(1, max_down);
  at::parallel_for(0, across * down, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t column = i % across * max_columns, row = i / across * tokens / down;
      const int64_t columns = std::min(max_columns, weight.columns - column);
      const int64_t rows = (i / across + 1) * tokens / down - row;
      auto sum = tensor_of(dhidden.part(row, rows, column, columns));
      const Slices<T, W> slices(weight.part(0, weight.rows, column, columns), slice_rows);
      for (int64_t first = 0; first < weight.rows; first += slices.rows()) {
        const auto slice = slices.from(first);
        const auto gradient = dlogits.part(row, rows, first, slice.rows);
        at::cpu::addmm_(sum, tensor_of(gradient), tensor_of(slice));
      }
    }
  });
}

#define OPD_PRODUCTS(T, W)                                                                  \
  template void project(const Matrix<const T>&, const Matrix<const W>&, const Matrix<T>&,   \
                        int64_t);                                                           \
  template void add_hidden_gradient(const Matrix<T>&, const Matrix<const T>&,               \
                                    const Matrix<const W>&, int64_t);

OPD_PRODUCTS(float, float)
OPD_PRODUCTS(float, at::BFloat16)
OPD_PRODUCTS(float, at::Half)
OPD_PRODUCTS(double, double)
OPD_PRODUCTS(double, float)
OPD_PRODUCTS(double, at::BFloat16)
OPD_PRODUCTS(double, at::Half)

#undef OPD_PRODUCTS

}  // namespace opd
