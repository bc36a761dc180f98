// Python's door to the epilogues: checks every tensor, then calls the kernels on raw pointers.

#include <ATen/ops/empty.h>
#include <torch/csrc/utils/pybind.h>

#include <tuple>
#include <vector>

#include "../checks.h"
#include "divergence.h"
#include "epilogue.h"

namespace {

using opd::Arguments;
using opd::OptionalTensor;
using opd::Tensor;
using opd::Use;

template <typename T>
opd::Chunk<T> chunk_of(const Tensor& chunk, int64_t first_id) {
  return {chunk.data_ptr<T>(), chunk.size(0), chunk.size(1), chunk.stride(0), first_id};
}

Arguments arguments_of(const Tensor& chunk, Use use) {
  Arguments arguments(at::kCPU);
  arguments.add_matrix(chunk, "chunk", use);
  TORCH_CHECK_TYPE(chunk.scalar_type() == at::kFloat || chunk.scalar_type() == at::kDouble,
                   "chunk: expected float32 or float64, got ", chunk.scalar_type());
  return arguments;
}

void check_first_id(const Tensor& chunk, int64_t first_id) {
  const int64_t last = INT64_MAX - chunk.size(1);
  TORCH_CHECK_VALUE(first_id >= 0 && first_id <= last, "first_id: expected 0 to ", last, ", got ",
                    first_id);
}

void add_bias(Arguments& arguments, const OptionalTensor& bias, const char* name,
              const Tensor& chunk) {
  if (bias) arguments.add(*bias, name, chunk.scalar_type(), {chunk.size(1)});
}

template <typename T>
opd::Head<T> head_of(const OptionalTensor& bias, std::optional<double> softcap, double scale,
                     double temperature) {
  const double cap = softcap.value_or(1.0);
  return {bias ? bias->data_ptr<T>() : nullptr, softcap.has_value(), T(scale / temperature),
          T(scale / cap), T(cap / temperature)};
}

int64_t slots_of(const Tensor& ids, int64_t least) {
  TORCH_CHECK_VALUE(ids.dim() == 2 && ids.size(1) >= least, "ids: expected [n, K] with K >= ",
                    least, ", got ", ids.sizes());
  return ids.size(1);
}

template <typename Function>
void for_dtype_of(const Tensor& chunk, const Function& function) {
  if (chunk.scalar_type() == at::kFloat)
    function(float{});
  else
    function(double{});
}

void update(const Tensor& chunk, int64_t first_id, const OptionalTensor& bias,
            std::optional<double> softcap, double scale, double temperature, const Tensor& values,
            const Tensor& ids, bool selects, const Tensor& max, const Tensor& sum,
            const OptionalTensor& moment) {
  Arguments arguments = arguments_of(chunk, Use::kRead);
  check_first_id(chunk, first_id);
  add_bias(arguments, bias, "bias", chunk);
  const int64_t rows = chunk.size(0), k = slots_of(ids, 1);
  const auto dtype = chunk.scalar_type();
  arguments.add(ids, "ids", at::kLong, {rows, k}, selects ? Use::kWritten : Use::kRead);
  arguments.add(values, "values", dtype, {rows, k}, Use::kWritten);
  arguments.add(max, "max", dtype, {rows}, Use::kWritten);
  arguments.add(sum, "sum", dtype, {rows}, Use::kWritten);
  if (moment) arguments.add(*moment, "moment", dtype, {rows}, Use::kWritten);
  for_dtype_of(chunk, [&](auto zero) {
    using T = decltype(zero);
    const opd::State<T> state{values.data_ptr<T>(), ids.data_ptr<int64_t>(), k, selects,
                              max.data_ptr<T>(),    sum.data_ptr<T>(),
                              moment ? moment->data_ptr<T>() : nullptr};
    const auto head = head_of<T>(bias, softcap, scale, temperature);
    const pybind11::gil_scoped_release no_gil;
    opd::update(chunk_of<T>(chunk, first_id), head, state);
  });
}

// Adds what both forms of the gradient take; returns K.
int64_t add_gradient(Arguments& arguments, const Tensor& chunk, const OptionalTensor& bias,
                     const Tensor& ids, const Tensor& dvalues, const Tensor& tail,
                     const Tensor& dtail) {
  const int64_t rows = chunk.size(0), k = slots_of(ids, 0);
  const auto dtype = chunk.scalar_type();
  add_bias(arguments, bias, "bias", chunk);
  arguments.add(ids, "ids", at::kLong, {rows, k});
  arguments.add(dvalues, "dvalues", dtype, {rows, k});
  arguments.add(tail, "tail", dtype, {rows});
  arguments.add(dtail, "dtail", dtype, {rows});
  return k;
}

void gradient_(const Tensor& chunk, int64_t first_id, const OptionalTensor& bias,
               std::optional<double> softcap, double scale, double temperature, const Tensor& ids,
               const Tensor& dvalues, const Tensor& tail, const Tensor& dtail) {
  Arguments arguments = arguments_of(chunk, Use::kWritten);
  check_first_id(chunk, first_id);
  const int64_t k = add_gradient(arguments, chunk, bias, ids, dvalues, tail, dtail);
  for_dtype_of(chunk, [&](auto zero) {
    using T = decltype(zero);
    const auto head = head_of<T>(bias, softcap, scale, temperature);
    const pybind11::gil_scoped_release no_gil;
    opd::gradient(chunk_of<T>(chunk, first_id), head, ids.data_ptr<int64_t>(),
                  dvalues.data_ptr<T>(), k, tail.data_ptr<T>(), dtail.data_ptr<T>());
  });
}

// Row and column [E] and value [E] of every entry, and kept [n].
std::tuple<Tensor, Tensor, Tensor, Tensor> filtered_gradient(
    const Tensor& chunk, const OptionalTensor& bias, std::optional<double> softcap, double scale,
    double temperature, const Tensor& ids, const Tensor& dvalues, const Tensor& tail,
    const Tensor& dtail, const Tensor& threshold) {
  Arguments arguments = arguments_of(chunk, Use::kRead);
  const int64_t k = add_gradient(arguments, chunk, bias, ids, dvalues, tail, dtail);
  const int64_t rows = chunk.size(0);
  arguments.add(threshold, "threshold", chunk.scalar_type(), {rows});
  Tensor row_ids, columns, values, kept = at::empty({rows}, chunk.options());
  for_dtype_of(chunk, [&](auto zero) {
    using T = decltype(zero);
    const auto head = head_of<T>(bias, softcap, scale, temperature);
    const pybind11::gil_scoped_release no_gil;
    const auto entries = opd::filtered_gradient(
        chunk_of<T>(chunk, 0), head, ids.data_ptr<int64_t>(), dvalues.data_ptr<T>(), k,
        tail.data_ptr<T>(), dtail.data_ptr<T>(), threshold.data_ptr<T>(), kept.data_ptr<T>());
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

void divergence_(const Tensor& chunk, const OptionalTensor& bias, std::optional<double> softcap,
                 double scale, double temperature, const Tensor& teacher,
                 const OptionalTensor& teacher_bias, std::optional<double> teacher_softcap,
                 double teacher_scale, double teacher_temperature, double beta,
                 const OptionalTensor& upstream, const Tensor& loss) {
  Arguments arguments = arguments_of(chunk, upstream ? Use::kWritten : Use::kRead);
  arguments.add_matrix(teacher, "teacher");
  const auto dtype = chunk.scalar_type();
  TORCH_CHECK_VALUE(teacher.sizes() == chunk.sizes() && teacher.scalar_type() == dtype &&
                        chunk.size(1) >= 1,
                    "teacher: expected the student's shape [n, V] and dtype, ", chunk.sizes(),
                    " of ", dtype, ", got ", teacher.sizes(), " of ", teacher.scalar_type());
  TORCH_CHECK_VALUE(beta >= 0 && beta <= 1, "beta: expected 0 to 1, got ", beta);
  add_bias(arguments, bias, "bias", chunk);
  add_bias(arguments, teacher_bias, "teacher_bias", teacher);
  if (upstream) arguments.add(*upstream, "upstream", dtype, {chunk.size(0)});
  arguments.add(loss, "loss", dtype, {chunk.size(0)}, Use::kWritten);
  for_dtype_of(chunk, [&](auto zero) {
    using T = decltype(zero);
    const auto head = head_of<T>(bias, softcap, scale, temperature);
    const auto teacher_head =
        head_of<T>(teacher_bias, teacher_softcap, teacher_scale, teacher_temperature);
    const pybind11::gil_scoped_release no_gil;
    opd::divergence(chunk_of<T>(chunk, 0), head, chunk_of<T>(teacher, 0), teacher_head, beta,
                    upstream ? upstream->data_ptr<T>() : nullptr, loss.data_ptr<T>());
  });
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  using pybind11::arg;  // the names are for messages
  m.def("update", &update, arg("chunk"), arg("first_id"), arg("bias"), arg("softcap"), arg("scale"),
        arg("temperature"), arg("values"), arg("ids"), arg("selects").noconvert(), arg("max"),
        arg("sum"), arg("moment"));
  m.def("gradient_", &gradient_, arg("chunk"), arg("first_id"), arg("bias"), arg("softcap"),
        arg("scale"), arg("temperature"), arg("ids"), arg("dvalues"), arg("tail"), arg("dtail"));
  m.def("filtered_gradient", &filtered_gradient, arg("chunk"), arg("bias"), arg("softcap"),
        arg("scale"), arg("temperature"), arg("ids"), arg("dvalues"), arg("tail"), arg("dtail"),
        arg("threshold"));
  m.def("divergence_", &divergence_, arg("chunk"), arg("bias"), arg("softcap"), arg("scale"),
        arg("temperature"), arg("teacher"), arg("teacher_bias"), arg("teacher_softcap"),
        arg("teacher_scale"), arg("teacher_temperature"), arg("beta"), arg("upstream"),
        arg("loss"));
}
