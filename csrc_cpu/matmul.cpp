#include <algorithm>
#include <cstring>

#include "csrc_cpu/checks.h"
#include "csrc_cpu/cpu_backend.h"
#include "csrc_cpu/matmul_cache.h"
#include "csrc_cpu/parallel.h"

namespace bitfall {
namespace {

/// Checks x [R, K], weight [N, K] and y [R, N] of one dtype.
void check_linear(const char* operation, const Tensor& x, const Tensor& weight, const Tensor& y) {
  check_rank(operation, "weight", weight, 2);
  check_rank(operation, "rows", x, 2);
  check_floating(operation, "rows", x);
  check_tensor(operation, "weight", weight, x.dtype, Shape{weight.shape[0], x.shape[1]});
  check_tensor(operation, "result", y, x.dtype, Shape{x.shape[0], weight.shape[0]});
}

}  // namespace

void CpuBackend::product(MatmulSpec spec, const Tensor& a, const Tensor& b, const Tensor& bias,
                         const Tensor& c) {
  if (c.numel() == 0) return;
  if (spec.k == 0) {
    // No rows to sum over: the gradient of an empty batch.
    if (spec.accumulate == Accumulate::no) fill_zero(c);
    return;
  }
  spec.has_bias = static_cast<bool>(bias);
  if (matmul_->is_native(a.dtype)) {
    spec.operands = a.dtype;
    spec.result = c.dtype;
    matmul_->run(spec, a.data, b.data, bias.data, c.data);
    return;
  }
  const std::int64_t numel = a.numel() + b.numel() + bias.numel() + c.numel();
  auto* next = static_cast<float*>(scratch(static_cast<std::size_t>(numel) * sizeof(float)));
  const auto convert = [&](const Tensor& tensor) -> Tensor {
    const Tensor converted{next, DType::f32, tensor.shape};
    next += tensor.numel();
    if (tensor) cast(tensor, converted);
    return converted;
  };
  const Tensor a_f32 = convert(a), b_f32 = convert(b), bias_f32 = convert(bias);
  const Tensor c_f32 = c.dtype == DType::f32 ? c : convert(c);
  matmul_->run(spec, a_f32.data, b_f32.data, bias_f32.data, c_f32.data);
  if (c.dtype != DType::f32) cast(c_f32, c);
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

void CpuBackend::linear_forward(const Tensor& x, const Tensor& weight, const Tensor& bias,
                                const Tensor& y) {
  check_linear("linear_forward", x, weight, y);
  if (bias) check_tensor("linear_forward", "bias", bias, x.dtype, Shape{weight.shape[0]});
  product({.m = x.shape[0], .n = weight.shape[0], .k = x.shape[1], .b = Transpose::yes}, x, weight,
          bias, y);
}

void CpuBackend::linear_activation_forward(const Tensor& x, const Tensor& weight,
                                           const Tensor& bias, Activation activation,
                                           const Tensor& pre_activation, const Tensor& y) {
  linear_forward(x, weight, bias, pre_activation);
  check_tensor("linear_activation_forward", "y", y, x.dtype, pre_activation.shape);
  parallel_ranges(y.numel(), 8192, [&](std::int64_t begin, std::int64_t end) {
    kernels_.elementwise->activation_forward(activation, y.dtype, element(pre_activation, begin),
                                             element(y, begin), end - begin);
  });
}

void CpuBackend::linear_backward_input(const Tensor& dy, const Tensor& weight, const Tensor& dx,
                                       Accumulate accumulate) {
  check_linear("linear_backward_input", dx, weight, dy);
  product({.m = dy.shape[0], .n = weight.shape[1], .k = dy.shape[1], .accumulate = accumulate}, dy,
          weight, {}, dx);
}

void CpuBackend::linear_backward_weight(const Tensor& dy, const Tensor& x, const Tensor& dweight,
                                        const Tensor& dbias, Accumulate accumulate) {
  constexpr const char* kName = "linear_backward_weight";
  check_rank(kName, "x", x, 2);
  check_rank(kName, "dy", dy, 2);
  check_floating(kName, "x", x);
  check_tensor(kName, "dy", dy, x.dtype, Shape{x.shape[0], dy.shape[1]});
  check_tensor(kName, "dweight", dweight, DType::f32, Shape{dy.shape[1], x.shape[1]});
  if (dbias) check_tensor(kName, "dbias", dbias, DType::f32, Shape{dy.shape[1]});
  product({.m = dy.shape[1],
           .n = x.shape[1],
           .k = x.shape[0],
           .a = Transpose::yes,
           .accumulate = accumulate},
          dy, x, {}, dweight);
  if (dbias) column_sums(dy, dbias, accumulate);
}

}  // namespace bitfall
