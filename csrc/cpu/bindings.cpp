// Python's door to the epilogues: checks every tensor, then calls the kernels on raw pointers.

#include <ATen/ops/empty.h>
#include <torch/csrc/utils/pybind.h>

#include <tuple>
#include <vector>

#include "../checks.h"
#include "divergence.h"
#include "epilogue.h"

namespace {

using opd::OptionalTensor;
using opd::Tensor;

void check(const Tensor& tensor, const char* name, at::ScalarType dtype, at::IntArrayRef shape) {
  opd::check(tensor, name, at::kCPU, dtype, shape);
}

template <typename T>
opd::Chunk<T> chunk_of(const Tensor& chunk, int64_t first_id) {
  return {chunk.data_ptr<T>(), chunk.size(0), chunk.size(1), chunk.stride(0), first_id};
}

void check_chunk(const Tensor& chunk, int64_t first_id) {
  TORCH_CHECK_TYPE(chunk.device().is_cpu() && (chunk.scalar_type() == at::kFloat ||
                                               chunk.scalar_type() == at::kDouble),
                   "chunk: expected float32 or float64 on the CPU, got ", chunk.scalar_type(),
                   " on ", chunk.device());
  opd::check_rows(chunk, "chunk");
  TORCH_CHECK_VALUE(first_id >= 0, "first_id: expected at least 0, got ", first_id);
}

template <typename T>
opd::Head<T> head_of(const Tensor& chunk, const OptionalTensor& bias, std::optional<double> softcap,
                     double scale, double temperature) {
  if (bias) check(*bias, "bias", chunk.scalar_type(), {chunk.size(1)});
  const double cap = softcap.value_or(1.0);
  return {bias ? bias->data_ptr<T>() : nullptr, softcap.has_value(), T(scale / temperature),
          T(scale / cap), T(cap / temperature)};
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
  check_chunk(chunk, first_id);
  const int64_t rows = chunk.size(0), k = values.dim() == 2 ? values.size(1) : 0;
  TORCH_CHECK_VALUE(k >= 1, "values: expected [n, K] with K >= 1, got ", values.sizes());
  check(values, "values", chunk.scalar_type(), {rows, k});
  check(ids, "ids", at::kLong, {rows, k});
  check(max, "max", chunk.scalar_type(), {rows});
  check(sum, "sum", chunk.scalar_type(), {rows});
  if (moment) check(*moment, "moment", chunk.scalar_type(), {rows});
  for_dtype_of(chunk, [&](auto zero) {
    using T = decltype(zero);
    const opd::State<T> state{values.data_ptr<T>(), ids.data_ptr<int64_t>(), k, selects,
                              max.data_ptr<T>(),    sum.data_ptr<T>(),
                              moment ? moment->data_ptr<T>() : nullptr};
    const auto head = head_of<T>(chunk, bias, softcap, scale, temperature);
    const pybind11::gil_scoped_release no_gil;
    opd::update(chunk_of<T>(chunk, first_id), head, state);
  });
}

// Checks what both forms of the gradient take; returns K.
int64_t check_gradient(const Tensor& chunk, const Tensor& ids, const Tensor& dvalues,
                       const Tensor& tail, const Tensor& dtail) {
  const int64_t rows = chunk.size(0), k = ids.dim() == 2 ? ids.size(1) : 0;
  check(ids, "ids", at::kLong, {rows, k});
  check(dvalues, "dvalues", chunk.scalar_type(), {rows, k});
  check(tail, "tail", chunk.scalar_type(), {rows});
  check(dtail, "dtail", chunk.scalar_type(), {rows});
  return k;
}

void gradient_(const Tensor& chunk, int64_t first_id, const OptionalTensor& bias,
               std::optional<double> softcap, double scale, double temperature, const Tensor& ids,
               const Tensor& dvalues, const Tensor& tail, const Tensor& dtail) {
  check_chunk(chunk, first_id);
  const int64_t k = check_gradient(chunk, ids, dvalues, tail, dtail);
  for_dtype_of(chunk, [&](auto zero) {
    using T = decltype(zero);
    const auto head = head_of<T>(chunk, bias, softcap, scale, temperature);
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
  check_chunk(chunk, 0);
  const int64_t rows = chunk.size(0), k = check_gradient(chunk, ids, dvalues, tail, dtail);
  check(threshold, "threshold", chunk.scalar_type(), {rows});
  Tensor row_ids, columns, values, kept = at::empty({rows}, chunk.options());
  for_dtype_of(chunk, [&](auto zero) {
    using T = decltype(zero);
    const auto head = head_of<T>(chunk, bias, softcap, scale, temperature);
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
  check_chunk(chunk, 0);
  check_chunk(teacher, 0);
  TORCH_CHECK_VALUE(teacher.sizes() == chunk.sizes() &&
                        teacher.scalar_type() == chunk.scalar_type() && chunk.size(1) >= 1,
                    "teacher: expected the student's shape [n, V] and dtype, ", chunk.sizes(),
                    " of ", chunk.scalar_type(), ", got ", teacher.sizes(), " of ",
                    teacher.scalar_type());
  TORCH_CHECK_VALUE(beta >= 0 && beta <= 1, "beta: expected 0 to 1, got ", beta);
  check(loss, "loss", chunk.scalar_type(), {chunk.size(0)});
  if (upstream) check(*upstream, "upstream", chunk.scalar_type(), {chunk.size(0)});
  for_dtype_of(chunk, [&](auto zero) {
    using T = decltype(zero);
    const auto head = head_of<T>(chunk, bias, softcap, scale, temperature);
    const auto teacher_head =
        head_of<T>(teacher, teacher_bias, teacher_softcap, teacher_scale, teacher_temperature);
    const pybind11::gil_scoped_release no_gil;
    opd::divergence(chunk_of<T>(chunk, 0), head, chunk_of<T>(teacher, 0), teacher_head, beta,
                    upstream ? upstream->data_ptr<T>() : nullptr, loss.data_ptr<T>());
  });
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("update", &update);
  m.def("gradient_", &gradient_);
  m.def("filtered_gradient", &filtered_gradient);
  m.def("divergence_", &divergence_);
}
