// What the bindings of every backend ask of their tensors before they take the pointers.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/SmallVector.h>

#include <optional>

namespace opd {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

enum class Use { kRead, kWritten };

// The tensors of one call. Each is checked as it is added, and against those before it: on one
// device, and what is written in memory of its own.
class Arguments {
 public:
  explicit Arguments(at::DeviceType type) : type_(type) {}

  // A contiguous tensor.
  void add(const Tensor& tensor, const char* name, at::ScalarType dtype, at::IntArrayRef shape,
           Use use = Use::kRead) {
    check_device(tensor, name);
    TORCH_CHECK_TYPE(tensor.scalar_type() == dtype, name, ": expected ", dtype, " on ", *device_,
                     ", got ", tensor.scalar_type(), " on ", tensor.device());
    TORCH_CHECK_VALUE(tensor.sizes() == shape && tensor.is_contiguous(), name,
                      ": expected a contiguous tensor of shape ", shape, ", got ", tensor.sizes(),
                      " with strides ", tensor.strides());
    add_memory(tensor, name, use);
  }

  // A matrix whose rows are contiguous and do not overlap.
  void add_matrix(const Tensor& matrix, const char* name, Use use = Use::kRead) {
    check_device(matrix, name);
    TORCH_CHECK_VALUE(matrix.dim() == 2 && (matrix.stride(1) == 1 || matrix.size(1) <= 1) &&
                          (matrix.stride(0) >= matrix.size(1) || matrix.size(0) <= 1),
                      name, ": expected a matrix with contiguous rows, got shape ", matrix.sizes(),
                      " with strides ", matrix.strides());
    add_memory(matrix, name, use);
  }

 private:
  struct Memory {
    const char* name;
    const char *begin, *end;
    Use use;
  };

  void check_device(const Tensor& tensor, const char* name) {
    TORCH_CHECK_TYPE(tensor.device().type() == type_, name, ": expected a tensor on ", type_,
                     ", got one on ", tensor.device());
    if (!device_) device_ = tensor.device();
    TORCH_CHECK_TYPE(tensor.device() == *device_, name, ": expected device ", *device_, ", got ",
                     tensor.device());
    const bool is_subclass = tensor.key_set().has(c10::DispatchKey::Python);
    TORCH_CHECK_TYPE(tensor.layout() == at::kStrided && !is_subclass, name,
                     ": expected a plain strided tensor, got ", tensor.toString());
    TORCH_CHECK_VALUE(!tensor.is_neg() && !tensor.is_conj(), name,
                      ": expected the numbers that are in its memory, got a negated view; pass "
                      "resolve_neg() of it");
  }

  void add_memory(const Tensor& tensor, const char* name, Use use) {
    if (tensor.numel() == 0) return;
    int64_t elements = 1;
    for (int64_t i = 0; i < tensor.dim(); ++i) elements += (tensor.size(i) - 1) * tensor.stride(i);
    const int64_t width = tensor.element_size(), offset = tensor.storage_offset() * width;
    const at::Storage& storage = tensor.storage();
    const auto* data = static_cast<const char*>(storage.data_ptr().get());
    TORCH_CHECK_VALUE(data && offset + elements * width <= int64_t(storage.nbytes()), name,
                      ": expected memory for shape ", tensor.sizes(), ", got ",
                      data ? storage.nbytes() : 0, " bytes; it was freed, or never allocated");
    const Memory own{name, data + offset, data + offset + elements * width, use};
    for (const Memory& other : memory_) {
      const bool is_apart = own.end <= other.begin || other.end <= own.begin;
      TORCH_CHECK_VALUE(is_apart || (use == Use::kRead && other.use == Use::kRead), name,
                        ": expected memory apart from ", other.name,
                        "'s, as one of them is written, got some of it; pass a clone()");
    }
    memory_.push_back(own);
  }

  at::DeviceType type_;
  std::optional<at::Device> device_;
  c10::SmallVector<Memory, 12> memory_;
};

}  // namespace opd
