// A product of a slice is PyTorch's own, on one thread. A slice that another thread upcast would
// come out of that core's cache line by line, and a product on all threads waits at its end for the
// last of them.

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

// Columns of a thread, of logits or of dhidden, in multiples of this start where a vector does.
constexpr int64_t kAlignment = 16;
// Fewer columns of dhidden to a thread would not pay for packing dlogits, which each thread does,
// and fewer tokens not for the weight; and of two or three MKL adds up long chains (docs/log.md).
constexpr int64_t kLeastColumns = 128, kLeastTokens = 32;

int64_t divided(int64_t total, int64_t by) { return (total + by - 1) / by; }

// Columns of a thread, so many that all threads have some.
int64_t share_of(int64_t columns) {
  return divided(divided(columns, at::get_num_threads()), kAlignment) * kAlignment;
}

// A view, made past the dispatcher, whose modes and guards are those of the calling thread alone.
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

// Rows of a weight in T, a slice at a time: in their place, or upcast in that of the last slice.
template <typename T, typename W>
class Slices {
 public:
  Slices(const Matrix<const W>& weight, int64_t most_rows)
      : weight_(weight), rows_(std::min(most_rows, weight.rows)) {
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
  const int64_t most = share_of(weight.rows);
  at::parallel_for(0, divided(weight.rows, most), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i * most, rows = std::min(most, weight.rows - first);
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
  // A thread has columns of dhidden, and tokens where there are more threads than such columns.
  const int64_t most_columns = std::max(kLeastColumns, share_of(weight.columns));
  const int64_t across = divided(weight.columns, most_columns), tokens = dhidden.rows;
  const int64_t most_down = std::min(at::get_num_threads() / across, tokens / kLeastTokens);
  const int64_t down = std::max<int64_t>(1, most_down);
  at::parallel_for(0, across * down, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t column = i % across * most_columns, row = i / across * tokens / down;
      const int64_t columns = std::min(most_columns, weight.columns - column);
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
