// The arguments that the C++ and the CUDA bindings share, and the checks of tensors before a kernel
// takes their pointers. tests/binding_cases.py says which checks there are and why.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/version.h>

#include <optional>

namespace opd {

// opd_kernels/backends/extensions.py looks for this text in the library before it imports it.
constexpr const char* kBuiltFor = "opd_kernels is built for torch " TORCH_VERSION;

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// A head as every binding takes it: bias, capped, inner and outer, in this order.
// z = outer * tanh(inner * (raw + bias)) if capped, else outer * (raw + bias). Head.factors of
// opd_kernels/backends/records.py computes inner and outer.
struct HeadArguments {
  const void* bias;  // [v] of the chunk's columns in the accumulator dtype, or null
  bool capped;
  double inner, outer;
};

// The dtype of logits, states, tails and losses: float64 for float64 chunks, else float32.
inline at::ScalarType accumulator_of(const Tensor& chunk) {
  return chunk.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

inline void check_first_id(const Tensor& chunk, int64_t first_id, int64_t max_columns) {
  const int64_t last = max_columns - chunk.size(1);
  TORCH_CHECK_VALUE(first_id >= 0 && first_id <= last, "first_id: expected 0 to ", last, ", got ",
                    first_id);
}

inline void check_divergence(const Tensor& chunk, const Tensor& teacher, double beta) {
  TORCH_CHECK_VALUE(teacher.sizes() == chunk.sizes() &&
                        teacher.scalar_type() == chunk.scalar_type() && chunk.size(1) >= 1,
                    "teacher: expected the student's shape [n, V] and dtype, ", chunk.sizes(),
                    " of ", chunk.scalar_type(), ", got ", teacher.sizes(), " of ",
                    teacher.scalar_type());
  TORCH_CHECK_VALUE(beta >= 0 && beta <= 1, "beta: expected 0 to 1, got ", beta);
}

// Checks the tensors of one call, one after the other; all must be on the device of the first.
class Arguments {
 public:
  explicit Arguments(at::DeviceType type) : type_(type) {}

  // A contiguous tensor.
  void add(const Tensor& tensor, const char* name, at::ScalarType dtype, at::IntArrayRef shape) {
    check_device(tensor, name);
    TORCH_CHECK_TYPE(tensor.scalar_type() == dtype, name, ": expected ", dtype, " on ", *device_,
                     ", got ", tensor.scalar_type(), " on ", tensor.device());
    TORCH_CHECK_VALUE(tensor.sizes() == shape && tensor.is_contiguous(), name,
                      ": expected a contiguous tensor of shape ", shape, ", got ", tensor.sizes(),
                      " with strides ", tensor.strides());
    check_memory(tensor, name);
  }

  // A matrix whose rows are contiguous and do not overlap.
  void add_matrix(const Tensor& matrix, const char* name) {
    check_device(matrix, name);
    TORCH_CHECK_VALUE(matrix.dim() == 2 && (matrix.stride(1) == 1 || matrix.size(1) <= 1) &&
                          (matrix.stride(0) >= matrix.size(1) || matrix.size(0) <= 1),
                      name, ": expected a matrix with contiguous rows, got shape ", matrix.sizes(),
                      " with strides ", matrix.strides());
    check_memory(matrix, name);
  }

  HeadArguments add_head(const Tensor& chunk, const char* bias_name, const OptionalTensor& bias,
                         bool capped, double inner, double outer) {
    if (bias) add(*bias, bias_name, accumulator_of(chunk), {chunk.size(1)});
    return {bias ? bias->data_ptr() : nullptr, capped, inner, outer};
  }

  // Token ids [n, K] with K from min_k to max_k; returns K.
  int64_t add_ids(const Tensor& ids, int64_t rows, int64_t min_k, int64_t max_k) {
    const int64_t k = ids.dim() == 2 ? ids.size(1) : -1;
    TORCH_CHECK_VALUE(ids.dim() == 2 && ids.size(0) == rows && k >= min_k && k <= max_k,
                      "ids: expected [", rows, ", K] with K from ", min_k, " to ", max_k, ", got ",
                      ids.sizes());
    add(ids, "ids", at::kLong, {rows, k});
    return k;
  }

  // The tensors of RowState in opd_kernels/backends/records.py, except ids.
  void add_state(const Tensor& chunk, int64_t k, const Tensor& values, const Tensor& max,
                 const Tensor& sum, const OptionalTensor& moment) {
    const auto dtype = accumulator_of(chunk);
    const int64_t rows = chunk.size(0);
    add(values, "values", dtype, {rows, k});
    add(max, "max", dtype, {rows});
    add(sum, "sum", dtype, {rows});
    if (moment) add(*moment, "moment", dtype, {rows});
  }

  // The tensors of RowGradient: dvalues [rows, k], tail [rows] and dtail [rows].
  void add_row_gradient(const Tensor& chunk, int64_t k, const Tensor& dvalues, const Tensor& tail,
                        const Tensor& dtail) {
    const auto dtype = accumulator_of(chunk);
    const int64_t rows = chunk.size(0);
    add(dvalues, "dvalues", dtype, {rows, k});
    add(tail, "tail", dtype, {rows});
    add(dtail, "dtail", dtype, {rows});
  }

 private:
  void check_device(const Tensor& tensor, const char* name) {
    TORCH_CHECK_TYPE(tensor.device().type() == type_, name, ": expected a tensor on ", type_,
                     ", got one on ", tensor.device());
    if (!device_) device_ = tensor.device();
    TORCH_CHECK_TYPE(tensor.device() == *device_, name, ": expected device ", *device_, ", got ",
                     tensor.device());
    const bool is_subclass = tensor.key_set().has(c10::DispatchKey::Python);
    TORCH_CHECK_TYPE(tensor.layout() == at::kStrided && !is_subclass, name,
                     ": expected a plain strided tensor, got ", tensor.toString());
    // The memory of a negated view holds the numbers with the other sign.
    TORCH_CHECK_VALUE(!tensor.is_neg(), name, ": expected a tensor that is not a negated view; ",
                      "pass resolve_neg() of it");
  }

  // FSDP frees the memory of parameters and leaves their shapes.
  static void check_memory(const Tensor& tensor, const char* name) {
    if (tensor.numel() == 0) return;
    int64_t elements = tensor.storage_offset() + 1;
    for (int64_t i = 0; i < tensor.dim(); ++i) elements += (tensor.size(i) - 1) * tensor.stride(i);
    const at::Storage& storage = tensor.storage();
    const bool has_data = storage.data_ptr().get() != nullptr;
    TORCH_CHECK_VALUE(
        has_data && elements * int64_t(tensor.element_size()) <= int64_t(storage.nbytes()), name,
        ": expected memory for shape ", tensor.sizes(), ", got ", has_data ? storage.nbytes() : 0,
        " bytes; it was freed or never allocated");
  }

  at::DeviceType type_;
  std::optional<at::Device> device_;
};

}  // namespace opd
