// The Python bindings of the CUDA kernels: they check every tensor and pass raw pointers on.
// `stream` is PyTorch's current stream as an integer. tests/cuda_emulator builds this file for the
// CPU.

#include <ATen/ops/empty.h>
#include <torch/csrc/utils/pybind.h>

#include <utility>

#include "../checks.h"
#include "epilogue.h"

#ifndef OPD_DEVICE
#define OPD_DEVICE at::kCUDA
#endif
#ifndef OPD_LEAST_CAPABILITY
#define OPD_LEAST_CAPABILITY 0
#endif

namespace {

using opd::accumulator_of;
using opd::Arguments;
using opd::HeadArguments;
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

OpdMatrix add_matrix(Arguments& arguments, const Tensor& tensor, const char* name) {
  arguments.add_matrix(tensor, name);
  const OpdDtype dtype = dtype_of(tensor, name);
  TORCH_CHECK_VALUE(tensor.size(0) <= INT32_MAX && tensor.size(1) <= OPD_MAX_COLUMNS, name,
                    ": expected at most ", INT32_MAX, " rows and ", OPD_MAX_COLUMNS,
                    " columns, got ", tensor.sizes());
  return {tensor.data_ptr(), dtype, tensor.size(0), tensor.size(1), tensor.stride(0)};
}

// A chunk and the matrix for its gradient, which may be the chunk itself.
std::pair<OpdMatrix, OpdMatrix> add_chunk_and_out(Arguments& arguments, const Tensor& chunk,
                                                  const Tensor& out) {
  const OpdMatrix matrix = add_matrix(arguments, chunk, "chunk");
  if (out.is_same(chunk)) return {matrix, matrix};
  const OpdMatrix result = add_matrix(arguments, out, "out");
  const bool is_narrowed = matrix.dtype == OPD_FLOAT32 && out.element_size() == 2;
  TORCH_CHECK_TYPE(result.dtype == matrix.dtype || is_narrowed, "out: expected ",
                   chunk.scalar_type(), ", the chunk's dtype, or 16 bits for float32, got ",
                   out.scalar_type());
  TORCH_CHECK_VALUE(out.sizes() == chunk.sizes(), "out: expected ", chunk.sizes(), ", got ",
                    out.sizes());
  return {matrix, result};
}

OpdHead head_of(const HeadArguments& head) {
  return {head.bias, head.capped, head.inner, head.outer};
}

void check_launch(int error, const char* name) {
  TORCH_CHECK(error == 0, name, ": ", opd_error(error));
}

void* pointer(int64_t stream) { return reinterpret_cast<void*>(stream); }

void update(const Tensor& chunk, int64_t first_id, const OptionalTensor& bias, bool capped,
            double inner, double outer, const Tensor& values, const Tensor& ids, bool selects,
            const Tensor& max, const Tensor& sum, const OptionalTensor& moment, bool block_per_row,
            int64_t stream) {
  Arguments arguments(OPD_DEVICE);
  const OpdMatrix matrix = add_matrix(arguments, chunk, "chunk");
  opd::check_first_id(chunk, first_id, OPD_MAX_COLUMNS);
  const HeadArguments head = arguments.add_head(chunk, "bias", bias, capped, inner, outer);
  const int64_t k = arguments.add_ids(ids, chunk.size(0), selects,
                                      selects ? OPD_MAX_SELECTED : OPD_MAX_GIVEN);
  arguments.add_state(chunk, k, values, max, sum, moment);
  const OpdState state{values.data_ptr(), ids.data_ptr<int64_t>(), k, selects, max.data_ptr(),
                       sum.data_ptr(),    moment ? moment->data_ptr() : nullptr};
  check_launch(opd_update(matrix, first_id, head_of(head), state, block_per_row, pointer(stream)),
               "update");
}

void gradient(const Tensor& chunk, int64_t first_id, const OptionalTensor& bias, bool capped,
              double inner, double outer, const Tensor& ids, const Tensor& dvalues,
              const Tensor& tail, const Tensor& dtail, const Tensor& out, int64_t stream) {
  Arguments arguments(OPD_DEVICE);
  const auto [matrix, result] = add_chunk_and_out(arguments, chunk, out);
  opd::check_first_id(chunk, first_id, OPD_MAX_COLUMNS);
  const HeadArguments head = arguments.add_head(chunk, "bias", bias, capped, inner, outer);
  const int64_t k = arguments.add_ids(ids, chunk.size(0), 0, OPD_MAX_GIVEN);
  arguments.add_row_gradient(chunk, k, dvalues, tail, dtail);
  check_launch(opd_gradient(matrix, first_id, head_of(head), ids.data_ptr<int64_t>(),
                            dvalues.data_ptr(), k, tail.data_ptr(), dtail.data_ptr(), result,
                            pointer(stream)),
               "gradient");
}

void divergence(const Tensor& chunk, const OptionalTensor& bias, bool capped, double inner,
                double outer, const Tensor& teacher, const OptionalTensor& teacher_bias,
                bool teacher_capped, double teacher_inner, double teacher_outer, double beta,
                const OptionalTensor& upstream, const Tensor& loss, const Tensor& out,
                int64_t stream) {
  Arguments arguments(OPD_DEVICE);
  const auto [student, result] = add_chunk_and_out(arguments, chunk, out);
  const OpdMatrix other = add_matrix(arguments, teacher, "teacher");
  opd::check_divergence(chunk, teacher, beta);
  const HeadArguments head = arguments.add_head(chunk, "bias", bias, capped, inner, outer);
  const HeadArguments teacher_head = arguments.add_head(
      teacher, "teacher_bias", teacher_bias, teacher_capped, teacher_inner, teacher_outer);
  const auto dtype = accumulator_of(chunk);
  if (upstream) arguments.add(*upstream, "upstream", dtype, {chunk.size(0)});
  arguments.add(loss, "loss", dtype, {chunk.size(0)});
  check_launch(opd_divergence(student, head_of(head), other, head_of(teacher_head), beta,
                              upstream ? upstream->data_ptr() : nullptr, loss.data_ptr(), result,
                              pointer(stream)),
               "divergence");
}

// The dense operand and the sums of a product with a sparse matrix; both have D columns.
std::pair<OpdMatrix, OpdMatrix> add_product(Arguments& arguments, const Tensor& dense,
                                            const Tensor& sums) {
  const OpdMatrix matrix = add_matrix(arguments, dense, "dense");
  TORCH_CHECK_VALUE(dense.size(1) <= OPD_MAX_DIM, "dense: expected at most ", OPD_MAX_DIM,
                    " columns, got ", dense.sizes());
  const OpdMatrix result = add_matrix(arguments, sums, "sums");
  TORCH_CHECK_TYPE(sums.scalar_type() == accumulator_of(dense), "sums: expected ",
                   accumulator_of(dense), ", got ", sums.scalar_type());
  TORCH_CHECK_VALUE(sums.size(1) == dense.size(1) && sums.is_contiguous(),
                    "sums: expected a contiguous tensor of ", dense.size(1), " columns, got ",
                    sums.sizes(), " with strides ", sums.strides());
  return {matrix, result};
}

// sums [n, D] += coefficients [n, K] at ids [n, K] of an [n, V] matrix @ dense [V, D].
void sparse_product(const Tensor& ids, const Tensor& coefficients, const Tensor& dense,
                    const Tensor& sums, int64_t stream) {
  Arguments arguments(OPD_DEVICE);
  const auto [matrix, result] = add_product(arguments, dense, sums);
  const int64_t rows = sums.size(0), k = arguments.add_ids(ids, rows, 0, INT32_MAX);
  arguments.add(coefficients, "coefficients", accumulator_of(dense), {rows, k});
  check_launch(opd_sparse_product(ids.data_ptr<int64_t>(), coefficients.data_ptr(), k, matrix,
                                  result, pointer(stream)),
               "sparse_product");
}

// sums [V, D] += the transposed [n, V] matrix @ dense [n, D]. Its entries [E] are sorted by id.
void sparse_scatter(const Tensor& ids, const Tensor& rows, const Tensor& coefficients,
                    const Tensor& dense, const Tensor& sums, int64_t stream) {
  Arguments arguments(OPD_DEVICE);
  const auto [matrix, result] = add_product(arguments, dense, sums);
  const int64_t entries = ids.numel(), limit = int64_t(OPD_PIECE) * INT32_MAX;
  TORCH_CHECK_VALUE(entries <= limit, "ids: expected at most ", limit, " entries, got ", entries);
  arguments.add(ids, "ids", at::kLong, {entries});
  arguments.add(rows, "rows", at::kLong, {entries});
  arguments.add(coefficients, "coefficients", accumulator_of(dense), {entries});
  const int64_t pieces = (entries + OPD_PIECE - 1) / OPD_PIECE;
  const Tensor partials = at::empty({pieces, dense.size(1)}, coefficients.options());
  check_launch(opd_sparse_scatter(ids.data_ptr<int64_t>(), rows.data_ptr<int64_t>(),
                                  coefficients.data_ptr(), entries, matrix, result,
                                  partials.data_ptr(), pointer(stream)),
               "sparse_scatter");
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.attr("BUILT_FOR") = opd::kBuiltFor;
  m.attr("MAX_SELECTED") = OPD_MAX_SELECTED;
  m.attr("MAX_GIVEN") = OPD_MAX_GIVEN;
  m.attr("PIECE") = OPD_PIECE;
  m.attr("LEAST_CAPABILITY") = OPD_LEAST_CAPABILITY;
  using pybind11::arg;  // error messages show the names
  m.def("update", &update, arg("chunk"), arg("first_id"), arg("bias"), arg("capped").noconvert(),
        arg("inner"), arg("outer"), arg("values"), arg("ids"), arg("selects").noconvert(),
        arg("max"), arg("sum"), arg("moment"), arg("block_per_row").noconvert(), arg("stream"));
  m.def("gradient", &gradient, arg("chunk"), arg("first_id"), arg("bias"),
        arg("capped").noconvert(), arg("inner"), arg("outer"), arg("ids"), arg("dvalues"),
        arg("tail"), arg("dtail"), arg("out"), arg("stream"));
  m.def("divergence", &divergence, arg("chunk"), arg("bias"), arg("capped").noconvert(),
        arg("inner"), arg("outer"), arg("teacher"), arg("teacher_bias"),
        arg("teacher_capped").noconvert(), arg("teacher_inner"), arg("teacher_outer"), arg("beta"),
        arg("upstream"), arg("loss"), arg("out"), arg("stream"));
  m.def("sparse_product", &sparse_product, arg("ids"), arg("coefficients"), arg("dense"),
        arg("sums"), arg("stream"));
  m.def("sparse_scatter", &sparse_scatter, arg("ids"), arg("rows"), arg("coefficients"),
        arg("dense"), arg("sums"), arg("stream"));
}
