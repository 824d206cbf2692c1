#include <algorithm>
#include <cstring>

#include "core/checks.h"
#include "core/operation_checks.h"
#include "csrc_cpu/cpu_backend.h"
#include "csrc_cpu/matmul_cache.h"
#include "csrc_cpu/parallel.h"

namespace bitfall {
namespace {

constexpr std::int64_t kRowsAfter = 64;  ///< rows per call of what follows a product

MatmulSpec forward_spec(const Tensor& x, const Tensor& weight, const Tensor& bias,
                        Accumulate accumulate) {
  return {.n = weight.shape[0],
          .k = weight.shape[1],
          .transpose = Transpose::yes,
          .accumulate = accumulate,
          .has_bias = static_cast<bool>(bias),
          .dtype = x.dtype};
}

}  // namespace

std::vector<Tensor> CpuBackend::f32_copies(std::initializer_list<Tensor> tensors) {
  std::int64_t numel = 0;
  for (const Tensor& tensor : tensors) numel += tensor.numel();
  auto* next = static_cast<float*>(scratch(static_cast<std::size_t>(numel) * sizeof(float)));
  std::vector<Tensor> copies;
  for (const Tensor& tensor : tensors) {
    copies.push_back({tensor ? next : nullptr, DType::f32, tensor.shape});
    if (tensor) cast(tensor, copies.back());
    next += tensor.numel();
  }
  return copies;
}

void CpuBackend::multiply_rows(const MatmulSpec& spec, const Tensor& x, const Tensor& weight,
                               const Tensor& bias, const Tensor& y, const AfterRows& after) {
  const std::int64_t rows = x.shape[0];
  if (rows == 0) return;
  if (matmul_->is_native(spec.dtype)) {
    matmul_->multiply(spec, {rows, x.data, weight.data, bias.data, y.data}, after);
    return;
  }
  const std::vector<Tensor> f32 = f32_copies({x, weight, bias, y});
  MatmulSpec f32_spec = spec;
  f32_spec.dtype = DType::f32;
  matmul_->multiply(f32_spec, {rows, f32[0].data, f32[1].data, f32[2].data, f32[3].data}, {});
  cast(f32[3], y);
  if (after) parallel_ranges(rows, kRowsAfter, after);
}

void CpuBackend::linear_forward(const Tensor& x, const Tensor& weight, const Tensor& bias,
                                const Tensor& y, Accumulate accumulate) {
  check_linear("linear_forward", x, weight, bias, y);
  multiply_rows(forward_spec(x, weight, bias, accumulate), x, weight, bias, y, {});
}

void CpuBackend::linear_activation_forward(const Tensor& x, const Tensor& weight,
                                           const Tensor& bias, Activation activation,
                                           const Tensor& pre_activation, const Tensor& y) {
  constexpr const char* kName = "linear_activation_forward";
  check_linear(kName, x, weight, bias, pre_activation);
  check_tensor(kName, "y", y, x.dtype, pre_activation.shape);
  const std::int64_t columns = weight.shape[0];
  multiply_rows(forward_spec(x, weight, bias, Accumulate::no), x, weight, bias, pre_activation,
                [&](std::int64_t begin, std::int64_t end) {
                  kernels_.elementwise->activation_forward(
                      activation, y.dtype, element(pre_activation, begin * columns),
                      element(y, begin * columns), (end - begin) * columns);
                });
}

void CpuBackend::linear_backward_input(const Tensor& dy, const Tensor& weight, const Tensor& dx,
                                       Accumulate accumulate) {
  check_linear("linear_backward_input", dx, weight, {}, dy);
  const MatmulSpec spec{.n = weight.shape[1],
                        .k = weight.shape[0],
                        .transpose = Transpose::no,
                        .accumulate = accumulate,
                        .has_bias = false,
                        .dtype = dy.dtype};
  multiply_rows(spec, dy, weight, {}, dx, {});
}

void CpuBackend::linear_backward_weight(const Tensor& dy, const Tensor& x, const Tensor& dweight,
                                        const Tensor& dbias, Accumulate accumulate) {
  check_linear_backward_weight(dy, x, dweight, dbias);
  if (x.shape[0] > 0) {
    add_weight_gradient(dy, x, dweight, accumulate);
  } else if (accumulate == Accumulate::no) {
    fill_zero(dweight);
  }
  if (dbias) column_sums(dy, dbias, accumulate);
}

void CpuBackend::add_weight_gradient(const Tensor& dy, const Tensor& x, const Tensor& dweight,
                                     Accumulate accumulate) {
  WeightGradientSpec spec{x.shape[0], dweight.shape[0], dweight.shape[1], x.dtype};
  // oneDNN cannot add to a weight gradient: the old one waits in scratch memory.
  const bool native = matmul_->is_native(x.dtype);
  const Tensor old = accumulate == Accumulate::yes ? dweight : Tensor{};
  const Tensor convert_dy = native ? Tensor{} : dy, convert_x = native ? Tensor{} : x;
  const std::vector<Tensor> f32 = f32_copies({old, convert_dy, convert_x});
  if (!native) spec.dtype = DType::f32;
  matmul_->weight_gradient(spec, native ? dy.data : f32[1].data, native ? x.data : f32[2].data,
                           dweight.as<float>());
  if (!old) return;
  parallel_ranges(dweight.numel(), 8192, [&](std::int64_t begin, std::int64_t end) {
    kernels_.elementwise->accumulate(DType::f32, element(f32[0], begin),
                                     dweight.as<float>() + begin, end - begin);
  });
}

void CpuBackend::column_sums(const Tensor& x, const Tensor& sums, Accumulate accumulate) {
  constexpr std::int64_t kMostPartials = 32, kFewestRows = 32;
  const std::int64_t rows = x.shape[0], columns = x.shape[1];
  const std::int64_t chunk = std::max(kFewestRows, (rows + kMostPartials - 1) / kMostPartials);
  const std::int64_t partials = (rows + chunk - 1) / chunk;
  const auto bytes = static_cast<std::size_t>(columns) * sizeof(float);
  auto* partial_sums = static_cast<float*>(scratch(static_cast<std::size_t>(partials) * bytes));
  parallel_ranges(rows, chunk, [&](std::int64_t begin, std::int64_t end) {
    float* partial = partial_sums + begin / chunk * columns;
    std::memset(partial, 0, bytes);
    kernels_.elementwise->column_sums(x.dtype, element(x, begin * columns), end - begin, columns,
                                      partial);
  });
  if (accumulate == Accumulate::no) fill_zero(sums);
  kernels_.elementwise->column_sums(DType::f32, partial_sums, partials, columns, sums.as<float>());
}

}  // namespace bitfall
