#include "core/operation_checks.h"
#include "csrc_cpu/cpu_backend.h"
#include "csrc_cpu/parallel.h"

namespace bitfall {
namespace {

constexpr std::int64_t kChunk = 8192;  ///< elements: a few arrays of them fit the first-level cache

}  // namespace

void CpuBackend::cast(const Tensor& source, const Tensor& destination) {
  check_cast(source, destination);
  parallel_ranges(source.numel(), kChunk, [&](std::int64_t begin, std::int64_t end) {
    kernels_.elementwise->cast(source.dtype, element(source, begin), destination.dtype,
                               element(destination, begin), end - begin);
  });
}

void CpuBackend::activation_backward(Activation activation, const Tensor& pre_activation,
                                     const Tensor& dy, const Tensor& dpre, const Tensor& y) {
  check_activation_backward(pre_activation, dy, dpre, y);
  const DType dtype = pre_activation.dtype;
  parallel_ranges(pre_activation.numel(), kChunk, [&](std::int64_t begin, std::int64_t end) {
    kernels_.elementwise->activation_backward(activation, dtype, element(pre_activation, begin),
                                              element(dy, begin), element(dpre, begin),
                                              y ? element(y, begin) : nullptr, end - begin);
  });
}

void CpuBackend::activation_backward_tangent(Activation activation, const Tensor& pre_activation,
                                             const Tensor& pre_activation_tangent, const Tensor& dy,
                                             const Tensor& dy_tangent, const Tensor& dpre_tangent) {
  check_activation_backward_tangent(pre_activation, pre_activation_tangent, dy, dy_tangent,
                                    dpre_tangent);
  parallel_ranges(pre_activation.numel(), kChunk, [&](std::int64_t begin, std::int64_t end) {
    kernels_.elementwise->activation_backward_tangent(
        activation, pre_activation.dtype, element(pre_activation, begin),
        element(pre_activation_tangent, begin), element(dy, begin), element(dy_tangent, begin),
        element(dpre_tangent, begin), end - begin);
  });
}

void CpuBackend::dropout(const Dropout& dropout, const Tensor& row_keys, const Tensor& x,
                         const Tensor& y) {
  check_dropout(dropout, row_keys, x, y);
  const std::int64_t columns = x.shape[1];
  parallel_rows(x.shape[0], columns, [&](std::int64_t begin, std::int64_t end) {
    kernels_.elementwise->dropout(
        dropout, x.dtype, dropout.enabled() ? row_keys.as<std::int32_t>() + 2 * begin : nullptr,
        end - begin, columns, element(x, begin * columns), element(y, begin * columns));
  });
}

}  // namespace bitfall
