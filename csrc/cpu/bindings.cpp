// The Python bindings of the C++ kernels: they check every tensor and pass raw pointers on.

#include <ATen/ops/empty.h>
#include <ATen/record_function.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <array>
#include <tuple>
#include <type_traits>
#include <vector>

#include "../checks.h"
#include "divergence.h"
#include "epilogue.h"
#include "products.h"

namespace {

using opd::Arguments;
using opd::HeadArguments;
using opd::OptionalTensor;
using opd::Tensor;

template <typename T>
opd::Chunk<T> chunk_of(const Tensor& chunk, int64_t first_id) {
  return {chunk.data_ptr<T>(), chunk.size(0), chunk.size(1), chunk.stride(0), first_id};
}

// Starts the checks of a call with its first matrix, whose dtype is that of the logits.
Arguments arguments_of(const Tensor& matrix, const char* name = "chunk") {
  Arguments arguments(at::kCPU);
  arguments.add_matrix(matrix, name);
  TORCH_CHECK_TYPE(matrix.scalar_type() == at::kFloat || matrix.scalar_type() == at::kDouble, name,
                   ": expected float32 or float64, got ", matrix.scalar_type());
  return arguments;
}

template <typename T>
opd::Head<T> head_of(const HeadArguments& head) {
  return {static_cast<const T*>(head.bias), head.capped, head.inner, head.outer};
}

template <typename Function>
void for_dtype_of(const Tensor& chunk, const Function& function) {
  if (chunk.scalar_type() == at::kFloat)
    function(float{});
  else
    function(double{});
}

void update(const Tensor& chunk, int64_t first_id, const OptionalTensor& bias, bool capped,
            double inner, double outer, const Tensor& values, const Tensor& ids, bool selects,
            const Tensor& max, const Tensor& sum, const OptionalTensor& moment) {
  Arguments arguments = arguments_of(chunk);
  opd::check_first_id(chunk, first_id, INT64_MAX);
  const HeadArguments head = arguments.add_head(chunk, "bias", bias, capped, inner, outer);
  const int64_t k = arguments.add_ids(ids, chunk.size(0), 1, INT64_MAX);
  arguments.add_state(chunk, k, values, max, sum, moment);
  for_dtype_of(chunk, [&](auto zero) {
    using T = decltype(zero);
    const opd::State<T> state{values.data_ptr<T>(), ids.data_ptr<int64_t>(), k, selects,
                              max.data_ptr<T>(),    sum.data_ptr<T>(),
                              moment ? moment->data_ptr<T>() : nullptr};
    const pybind11::gil_scoped_release no_gil;
    opd::update(chunk_of<T>(chunk, first_id), head_of<T>(head), state);
  });
}

void gradient_(const Tensor& chunk, int64_t first_id, const OptionalTensor& bias, bool capped,
               double inner, double outer, const Tensor& ids, const Tensor& dvalues,
               const Tensor& tail, const Tensor& dtail) {
  Arguments arguments = arguments_of(chunk);
  opd::check_first_id(chunk, first_id, INT64_MAX);
  const HeadArguments head = arguments.add_head(chunk, "bias", bias, capped, inner, outer);
  const int64_t k = arguments.add_ids(ids, chunk.size(0), 0, INT64_MAX);
  arguments.add_row_gradient(chunk, k, dvalues, tail, dtail);
  for_dtype_of(chunk, [&](auto zero) {
    using T = decltype(zero);
    const pybind11::gil_scoped_release no_gil;
    opd::gradient(chunk_of<T>(chunk, first_id), head_of<T>(head), ids.data_ptr<int64_t>(),
                  dvalues.data_ptr<T>(), k, tail.data_ptr<T>(), dtail.data_ptr<T>());
  });
}

// Returns the row [E], column [E] and value [E] of every entry, and kept [n].
std::tuple<Tensor, Tensor, Tensor, Tensor> filtered_gradient(
    const Tensor& chunk, const OptionalTensor& bias, bool capped, double inner, double outer,
    const Tensor& ids, const Tensor& dvalues, const Tensor& tail, const Tensor& dtail,
    const Tensor& threshold) {
  Arguments arguments = arguments_of(chunk);
  const HeadArguments head = arguments.add_head(chunk, "bias", bias, capped, inner, outer);
  const int64_t rows = chunk.size(0), k = arguments.add_ids(ids, rows, 0, INT64_MAX);
  arguments.add_row_gradient(chunk, k, dvalues, tail, dtail);
  arguments.add(threshold, "threshold", chunk.scalar_type(), {rows});
  Tensor row_ids, columns, values, kept = at::empty({rows}, chunk.options());
  for_dtype_of(chunk, [&](auto zero) {
    using T = decltype(zero);
    const pybind11::gil_scoped_release no_gil;
    const auto entries =
        opd::filtered_gradient(chunk_of<T>(chunk, 0), head_of<T>(head), ids.data_ptr<int64_t>(),
                               dvalues.data_ptr<T>(), k, tail.data_ptr<T>(), dtail.data_ptr<T>(),
                               threshold.data_ptr<T>(), kept.data_ptr<T>());
    int64_t count = 0;
    for (const auto& row : entries) count += row.size();
    row_ids = at::empty({count}, ids.options());
    columns = at::empty({count}, ids.options());
    values = at::empty({count}, chunk.options());
    int64_t next = 0;
    for (int64_t row = 0; row < rows; ++row) {
      for (const auto& entry : entries[row]) {
        row_ids.data_ptr<int64_t>()[next] = row;
        columns.data_ptr<int64_t>()[next] = entry.column;
        values.data_ptr<T>()[next++] = entry.value;
      }
    }
  });
  return {row_ids, columns, values, kept};
}

void divergence_(const Tensor& chunk, const OptionalTensor& bias, bool capped, double inner,
                 double outer, const Tensor& teacher, const OptionalTensor& teacher_bias,
                 bool teacher_capped, double teacher_inner, double teacher_outer, double beta,
                 const OptionalTensor& upstream, const Tensor& loss) {
  Arguments arguments = arguments_of(chunk);
  arguments.add_matrix(teacher, "teacher");
  opd::check_divergence(chunk, teacher, beta);
  const HeadArguments head = arguments.add_head(chunk, "bias", bias, capped, inner, outer);
  const HeadArguments teacher_head = arguments.add_head(
      teacher, "teacher_bias", teacher_bias, teacher_capped, teacher_inner, teacher_outer);
  const auto dtype = chunk.scalar_type();
  if (upstream) arguments.add(*upstream, "upstream", dtype, {chunk.size(0)});
  arguments.add(loss, "loss", dtype, {chunk.size(0)});
  for_dtype_of(chunk, [&](auto zero) {
    using T = decltype(zero);
    const pybind11::gil_scoped_release no_gil;
    opd::divergence(chunk_of<T>(chunk, 0), head_of<T>(head), chunk_of<T>(teacher, 0),
                    head_of<T>(teacher_head), beta, upstream ? upstream->data_ptr<T>() : nullptr,
                    loss.data_ptr<T>());
  });
}

template <typename T>
opd::Matrix<T> matrix_of(const Tensor& matrix) {
  const int64_t rows = matrix.size(0), columns = matrix.size(1);
  const int64_t stride = std::max(matrix.stride(0), columns);  // one row may have any
  if constexpr (std::is_const_v<T>)
    return {matrix.const_data_ptr<std::remove_const_t<T>>(), rows, columns, stride};
  else
    return {matrix.mutable_data_ptr<T>(), rows, columns, stride};
}

// Checks that hidden [n, D], logits [n, v] and weight [v, D] fit together. hidden and logits, or
// their gradients, share a dtype; the weight may have a narrower one.
void check_product(const Tensor& hidden, const char* hidden_name, const Tensor& logits,
                   const char* logits_name, const Tensor& weight, int64_t slice_rows) {
  Arguments arguments = arguments_of(hidden, hidden_name);
  arguments.add_matrix(weight, "weight");
  const auto dtype = hidden.scalar_type(), narrow = weight.scalar_type();
  const bool is_narrow = narrow == at::kFloat || narrow == at::kBFloat16 || narrow == at::kHalf;
  TORCH_CHECK_TYPE(is_narrow || narrow == dtype, "weight: expected ", dtype,
                   " or a narrower float, got ", narrow);
  TORCH_CHECK_VALUE(weight.size(1) == hidden.size(1) && weight.size(1) >= 1,
                    "weight: expected [v, D] with the D >= 1 of ", hidden_name, ", ",
                    hidden.sizes(), ", got ", weight.sizes());
  arguments.add_matrix(logits, logits_name);
  const std::array shape{hidden.size(0), weight.size(0)};
  TORCH_CHECK_TYPE(logits.scalar_type() == dtype, logits_name, ": expected ", dtype, ", got ",
                   logits.scalar_type());
  TORCH_CHECK_VALUE(logits.sizes() == at::IntArrayRef(shape), logits_name, ": expected shape ",
                    at::IntArrayRef(shape), ", got ", logits.sizes());
  TORCH_CHECK_VALUE(slice_rows >= 1, "slice_rows: expected at least 1, got ", slice_rows);
}

template <typename Function>
void for_dtypes_of(const Tensor& logits, const Tensor& weight, const Function& function) {
  for_dtype_of(logits, [&](auto zero) {
    if (weight.scalar_type() == at::kBFloat16)
      function(zero, at::BFloat16{});
    else if (weight.scalar_type() == at::kHalf)
      function(zero, at::Half{});
    else if (weight.scalar_type() == at::kFloat)
      function(zero, float{});
    else if constexpr (std::is_same_v<decltype(zero), double>)
      function(zero, double{});
  });
}

void project(const Tensor& hidden, const Tensor& weight, const Tensor& out, int64_t slice_rows) {
  check_product(hidden, "hidden", out, "out", weight, slice_rows);
  RECORD_FUNCTION("opd_kernels::project", std::vector<c10::IValue>{});
  if (out.numel() == 0) return;
  for_dtypes_of(out, weight, [&](auto zero, auto narrow) {
    using T = decltype(zero);
    using W = decltype(narrow);
    const auto to = matrix_of<T>(out);
    const pybind11::gil_scoped_release no_gil;
    opd::project(matrix_of<const T>(hidden), matrix_of<const W>(weight), to, slice_rows);
  });
}

void add_hidden_gradient_(const Tensor& dhidden, const Tensor& dlogits, const Tensor& weight,
                          int64_t slice_rows) {
  check_product(dhidden, "dhidden", dlogits, "dlogits", weight, slice_rows);
  RECORD_FUNCTION("opd_kernels::add_hidden_gradient_", std::vector<c10::IValue>{});
  if (dlogits.numel() == 0) return;
  for_dtypes_of(dlogits, weight, [&](auto zero, auto narrow) {
    using T = decltype(zero);
    using W = decltype(narrow);
    const auto to = matrix_of<T>(dhidden);
    const pybind11::gil_scoped_release no_gil;
    opd::add_hidden_gradient(to, matrix_of<const T>(dlogits), matrix_of<const W>(weight),
                             slice_rows);
  });
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.attr("BUILT_FOR") = opd::kBuiltFor;
  using pybind11::arg;  // error messages show the names
  m.def("update", &update, arg("chunk"), arg("first_id"), arg("bias"), arg("capped").noconvert(),
        arg("inner"), arg("outer"), arg("values"), arg("ids"), arg("selects").noconvert(),
        arg("max"), arg("sum"), arg("moment"));
  m.def("gradient_", &gradient_, arg("chunk"), arg("first_id"), arg("bias"),
        arg("capped").noconvert(), arg("inner"), arg("outer"), arg("ids"), arg("dvalues"),
        arg("tail"), arg("dtail"));
  m.def("filtered_gradient", &filtered_gradient, arg("chunk"), arg("bias"),
        arg("capped").noconvert(), arg("inner"), arg("outer"), arg("ids"), arg("dvalues"),
        arg("tail"), arg("dtail"), arg("threshold"));
  m.def("divergence_", &divergence_, arg("chunk"), arg("bias"), arg("capped").noconvert(),
        arg("inner"), arg("outer"), arg("teacher"), arg("teacher_bias"),
        arg("teacher_capped").noconvert(), arg("teacher_inner"), arg("teacher_outer"), arg("beta"),
        arg("upstream"), arg("loss"));
  m.def("project", &project, arg("hidden"), arg("weight"), arg("out"), arg("slice_rows"));
  m.def("add_hidden_gradient_", &add_hidden_gradient_, arg("dhidden"), arg("dlogits"),
        arg("weight"), arg("slice_rows"));
}
