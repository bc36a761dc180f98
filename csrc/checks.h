// What the bindings of every backend ask of a tensor before they take its pointer.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace opd {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline void check(const Tensor& tensor, const char* name, at::Device device, at::ScalarType dtype,
                  at::IntArrayRef shape) {
  TORCH_CHECK_TYPE(tensor.device() == device && tensor.scalar_type() == dtype, name, ": expected ",
                   dtype, " on ", device, ", got ", tensor.scalar_type(), " on ", tensor.device());
  TORCH_CHECK_VALUE(tensor.sizes() == shape && tensor.is_contiguous(), name,
                    ": expected a contiguous tensor of shape ", shape, ", got ", tensor.sizes(),
                    " with strides ", tensor.strides());
}

// A matrix whose rows are contiguous and do not overlap.
inline void check_rows(const Tensor& matrix, const char* name) {
  TORCH_CHECK_VALUE(matrix.dim() == 2 && (matrix.stride(1) == 1 || matrix.size(1) <= 1) &&
                        (matrix.stride(0) >= matrix.size(1) || matrix.size(0) <= 1),
                    name, ": expected a matrix with contiguous rows, got shape ", matrix.sizes(),
                    " with strides ", matrix.strides());
}

}  // namespace opd
