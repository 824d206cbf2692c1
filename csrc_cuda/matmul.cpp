// Linear layers. The bias is added in the epilogue of the product where that is possible.
// Activations are not: cuBLASLt has the tanh form of GELU only, and applies it to the sum before it
// is rounded, whereas the contract wants the activation of the pre-activation as stored.
#include <algorithm>

#include "core/operation_checks.h"
#include "csrc_cuda/cuda_backend.h"
#include "csrc_cuda/matmul_plans.h"

namespace bitfall {
namespace {

MatmulSpec forward_spec(const Tensor& x, const Tensor& weight, Accumulate accumulate) {
  return {.rows = x.shape[0],
          .columns = weight.shape[0],
          .depth = weight.shape[1],
          .left = Stored::as_is,
          .right = Stored::transposed,
          .accumulate = accumulate,
          .dtype = x.dtype,
          .result_dtype = x.dtype};
}

/// Whether the product may add the bias. cuBLASLt chooses algorithms that read 16 bytes of it at
/// once, whatever its address, and may have none if a size is 1.
bool fits_epilogue(const MatmulSpec& spec, const void* bias) {
  return reinterpret_cast<std::uintptr_t>(bias) % 16 == 0 &&
         std::min({spec.rows, spec.columns, spec.depth}) > 1;
}

}  // namespace

void CudaBackend::linear_forward(const Tensor& x, const Tensor& weight, const Tensor& bias,
                                 const Tensor& y, Accumulate accumulate) {
  check_linear("linear_forward", x, weight, bias, y);
  if (x.shape[0] == 0) return;
  MatmulSpec spec = forward_spec(x, weight, accumulate);
  const void* added = device_data<void>(bias);
  if (added != nullptr && !fits_epilogue(spec, added)) {
    add_to_rows(bias, y, accumulate);
    spec.accumulate = Accumulate::yes;
    added = nullptr;
  }
  matmul_->multiply(spec,
                    {device_data<void>(x), device_data<void>(weight), added, device_data<void>(y)},
                    scratch(MatmulPlans::kWorkspaceBytes), stream());
}

void CudaBackend::linear_activation_forward(const Tensor& x, const Tensor& weight,
                                            const Tensor& bias, Activation activation,
                                            const Tensor& pre_activation, const Tensor& y) {
  constexpr const char* kName = "linear_activation_forward";
  check_linear(kName, x, weight, bias, pre_activation);
  check_linear(kName, x, weight, bias, y);
  linear_forward(x, weight, bias, pre_activation, Accumulate::no);
  activation_forward(activation, pre_activation, y);
}

void CudaBackend::linear_backward_input(const Tensor& dy, const Tensor& weight, const Tensor& dx,
                                        Accumulate accumulate) {
  check_linear("linear_backward_input", dx, weight, {}, dy);
  if (dx.shape[0] == 0) return;
  const MatmulSpec spec{.rows = dx.shape[0],
                        .columns = weight.shape[1],
                        .depth = weight.shape[0],
                        .left = Stored::as_is,
                        .right = Stored::as_is,
                        .accumulate = accumulate,
                        .dtype = dy.dtype,
                        .result_dtype = dy.dtype};
  matmul_->multiply(
      spec, {device_data<void>(dy), device_data<void>(weight), nullptr, device_data<void>(dx)},
      scratch(MatmulPlans::kWorkspaceBytes), stream());
}

void CudaBackend::linear_backward_weight(const Tensor& dy, const Tensor& x, const Tensor& dweight,
                                         const Tensor& dbias, Accumulate accumulate) {
  check_linear_backward_weight(dy, x, dweight, dbias);
  const std::int64_t rows = x.shape[0];
  if (rows > 0) {
    const MatmulSpec spec{.rows = dweight.shape[0],
                          .columns = dweight.shape[1],
                          .depth = rows,
                          .left = Stored::transposed,
                          .right = Stored::as_is,
                          .accumulate = accumulate,
                          .dtype = x.dtype,
                          .result_dtype = DType::f32};
    matmul_->multiply(
        spec, {device_data<void>(dy), device_data<void>(x), nullptr, device_data<void>(dweight)},
        scratch(MatmulPlans::kWorkspaceBytes), stream());
  } else if (accumulate == Accumulate::no) {
    fill_zero(dweight);
  }
  if (!dbias) return;
  const auto work_bytes =
      static_cast<std::size_t>(column_sums_work(rows, dbias.numel())) * sizeof(float);
  column_sums(dy, dbias, accumulate, static_cast<float*>(scratch(work_bytes)));
}

}  // namespace bitfall
