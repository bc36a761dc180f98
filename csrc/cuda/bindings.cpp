// Python's door to the launchers: checks every tensor, then passes raw pointers and PyTorch's
// current stream, which comes as an integer. The tests build it for the CPU, see tests/cuda_emulator.

#include <ATen/MemoryOverlap.h>
#include <ATen/ops/empty.h>
#include <torch/csrc/utils/pybind.h>

#include "../checks.h"
#include "epilogue.h"

#ifndef OPD_DEVICE
#define OPD_DEVICE at::kCUDA
#endif
#ifndef OPD_LEAST_CAPABILITY
#define OPD_LEAST_CAPABILITY 0
#endif

namespace {

using opd::check;
using opd::OptionalTensor;
using opd::Tensor;

OpdDtype dtype_of(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case at::kFloat:
      return OPD_FLOAT32;
    case at::kDouble:
      return OPD_FLOAT64;
    case at::kBFloat16:
      return OPD_BFLOAT16;
    case at::kHalf:
      return OPD_FLOAT16;
    default:
      TORCH_CHECK_TYPE(false, name, ": expected a floating dtype, got ", tensor.scalar_type());
  }
}

at::ScalarType accumulator_of(const Tensor& tensor) {
  return tensor.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

OpdMatrix matrix_of(const Tensor& tensor, const char* name) {
  TORCH_CHECK_TYPE(tensor.device().type() == OPD_DEVICE, name, ": expected a tensor on ",
                   OPD_DEVICE, ", got one on ", tensor.device());
  opd::check_rows(tensor, name);
  TORCH_CHECK_VALUE(tensor.size(1) < INT32_MAX, name, ": expected fewer than 2^31 columns");
  return {tensor.data_ptr(), dtype_of(tensor, name), tensor.size(0), tensor.size(1),
          tensor.stride(0)};
}

OpdHead head_of(const Tensor& chunk, const OptionalTensor& bias, bool capped, double inner,
                double outer) {
  if (bias) check(*bias, "bias", chunk.device(), accumulator_of(chunk), {chunk.size(1)});
  return {bias ? bias->data_ptr() : nullptr, capped, inner, outer};
}

int64_t slots_of(const Tensor& ids, int64_t rows, int64_t most) {
  const int64_t k = ids.dim() == 2 ? ids.size(1) : -1;
  TORCH_CHECK_VALUE(ids.dim() == 2 && ids.size(0) == rows && k <= most, "ids: expected [", rows,
                    ", K] with K <= ", most, ", got ", ids.sizes());
  return k;
}

void check_launch(int error, const char* name) {
  TORCH_CHECK(error == 0, name, ": ", opd_error(error));
}

void* pointer(int64_t stream) { return reinterpret_cast<void*>(stream); }

void update(const Tensor& chunk, int64_t first_id, const OptionalTensor& bias, bool capped,
            double inner, double outer, const Tensor& values, const Tensor& ids, bool selects,
            const Tensor& max, const Tensor& sum, const OptionalTensor& moment, bool block_per_row,
            int64_t stream) {
  const OpdMatrix matrix = matrix_of(chunk, "chunk");
  const int64_t rows = chunk.size(0);
  const int64_t k = slots_of(ids, rows, selects ? OPD_MAX_SELECTED : OPD_MAX_GIVEN);
  const auto dtype = accumulator_of(chunk);
  check(ids, "ids", chunk.device(), at::kLong, {rows, k});
  check(values, "values", chunk.device(), dtype, {rows, k});
  check(max, "max", chunk.device(), dtype, {rows});
  check(sum, "sum", chunk.device(), dtype, {rows});
  if (moment) check(*moment, "moment", chunk.device(), dtype, {rows});
  const OpdState state{values.data_ptr(), ids.data_ptr<int64_t>(), k, selects, max.data_ptr(),
                       sum.data_ptr(),    moment ? moment->data_ptr() : nullptr};
  const OpdHead head = head_of(chunk, bias, capped, inner, outer);
  check_launch(opd_update(matrix, first_id, head, state, block_per_row, pointer(stream)), "update");
}

void gradient(const Tensor& chunk, int64_t first_id, const OptionalTensor& bias, bool capped,
              double inner, double outer, const Tensor& ids, const Tensor& dvalues,
              const Tensor& tail, const Tensor& dtail, const Tensor& out, int64_t stream) {
  const OpdMatrix matrix = matrix_of(chunk, "chunk"), result = matrix_of(out, "out");
  TORCH_CHECK_VALUE(out.sizes() == chunk.sizes(), "out: expected ", chunk.sizes(), ", got ",
                    out.sizes());
  at::assert_no_partial_overlap(out, chunk);
  const int64_t rows = chunk.size(0), k = slots_of(ids, rows, OPD_MAX_GIVEN);
  const auto dtype = accumulator_of(chunk);
  check(ids, "ids", chunk.device(), at::kLong, {rows, k});
  check(dvalues, "dvalues", chunk.device(), dtype, {rows, k});
  check(tail, "tail", chunk.device(), dtype, {rows});
  check(dtail, "dtail", chunk.device(), dtype, {rows});
  const OpdHead head = head_of(chunk, bias, capped, inner, outer);
  check_launch(opd_gradient(matrix, first_id, head, ids.data_ptr<int64_t>(), dvalues.data_ptr(), k,
                            tail.data_ptr(), dtail.data_ptr(), result, pointer(stream)),
               "gradient");
}

void divergence(const Tensor& chunk, const OptionalTensor& bias, bool capped, double inner,
                double outer, const Tensor& teacher, const OptionalTensor& teacher_bias,
                bool teacher_capped, double teacher_inner, double teacher_outer, double beta,
                const OptionalTensor& upstream, const Tensor& loss, const Tensor& out,
                int64_t stream) {
  const OpdMatrix student = matrix_of(chunk, "chunk"), other = matrix_of(teacher, "teacher");
  const OpdMatrix result = matrix_of(out, "out");
  TORCH_CHECK_VALUE(teacher.sizes() == chunk.sizes() && out.sizes() == chunk.sizes() &&
                        teacher.scalar_type() == chunk.scalar_type() && chunk.size(1) >= 1,
                    "teacher and out: expected the student's shape [n, V] and the teacher in its "
                    "dtype, ", chunk.sizes(), " of ", chunk.scalar_type(), ", got ",
                    teacher.sizes(), " of ", teacher.scalar_type(), " and ", out.sizes());
  TORCH_CHECK_VALUE(beta >= 0 && beta <= 1, "beta: expected 0 to 1, got ", beta);
  at::assert_no_partial_overlap(out, chunk);
  const auto dtype = accumulator_of(chunk);
  check(loss, "loss", chunk.device(), dtype, {chunk.size(0)});
  if (upstream) check(*upstream, "upstream", chunk.device(), dtype, {chunk.size(0)});
  const OpdHead head = head_of(chunk, bias, capped, inner, outer);
  const OpdHead teacher_head =
      head_of(teacher, teacher_bias, teacher_capped, teacher_inner, teacher_outer);
  check_launch(opd_divergence(student, head, other, teacher_head, beta,
                              upstream ? upstream->data_ptr() : nullptr, loss.data_ptr(), result,
                              pointer(stream)),
               "divergence");
}

// sums [n, D] += coefficients [n, K] at ids [n, K] of an [n, V] matrix @ dense [V, D].
void sparse_product(const Tensor& ids, const Tensor& coefficients, const Tensor& dense,
                    const Tensor& sums, int64_t stream) {
  const OpdMatrix matrix = matrix_of(dense, "dense"), result = matrix_of(sums, "sums");
  const int64_t rows = sums.size(0), k = slots_of(ids, rows, INT64_MAX);
  check(ids, "ids", dense.device(), at::kLong, {rows, k});
  check(coefficients, "coefficients", dense.device(), accumulator_of(dense), {rows, k});
  check(sums, "sums", dense.device(), accumulator_of(dense), {rows, dense.size(1)});
  check_launch(opd_sparse_product(ids.data_ptr<int64_t>(), coefficients.data_ptr(), k, matrix,
                                  result, pointer(stream)),
               "sparse_product");
}

// sums [V, D] += the transposed matrix @ dense [n, D], its entries [E] in the order of their ids.
void sparse_scatter(const Tensor& ids, const Tensor& rows, const Tensor& coefficients,
                    const Tensor& dense, const Tensor& sums, int64_t stream) {
  const OpdMatrix matrix = matrix_of(dense, "dense"), result = matrix_of(sums, "sums");
  const int64_t entries = ids.numel();
  check(ids, "ids", dense.device(), at::kLong, {entries});
  check(rows, "rows", dense.device(), at::kLong, {entries});
  check(coefficients, "coefficients", dense.device(), accumulator_of(dense), {entries});
  check(sums, "sums", dense.device(), accumulator_of(dense), {sums.size(0), dense.size(1)});
  const int64_t pieces = (entries + OPD_PIECE - 1) / OPD_PIECE;
  const Tensor partials = at::empty({pieces, dense.size(1)}, coefficients.options());
  check_launch(opd_sparse_scatter(ids.data_ptr<int64_t>(), rows.data_ptr<int64_t>(),
                                  coefficients.data_ptr(), entries, matrix, result,
                                  partials.data_ptr(), pointer(stream)),
               "sparse_scatter");
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.attr("MAX_SELECTED") = OPD_MAX_SELECTED;
  m.attr("MAX_GIVEN") = OPD_MAX_GIVEN;
  m.attr("PIECE") = OPD_PIECE;
  m.attr("LEAST_CAPABILITY") = OPD_LEAST_CAPABILITY;
  m.def("update", &update);
  m.def("gradient", &gradient);
  m.def("divergence", &divergence);
  m.def("sparse_product", &sparse_product);
  m.def("sparse_scatter", &sparse_scatter);
}
