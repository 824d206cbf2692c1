#include "csrc_cpu/checks.h"
#include "csrc_cpu/cpu_backend.h"
#include "csrc_cpu/parallel.h"

namespace bitfall {
namespace {

constexpr std::int64_t kChunk = 8192;  ///< elements: a few arrays of them fit the first-level cache

}  // namespace

void CpuBackend::cast(const Tensor& source, const Tensor& destination) {
  check_floating("cast", "source", source);
  check_floating("cast", "destination", destination);
  check<ShapeError>(source.numel() == destination.numel(), "cast: source has ", source.numel(),
                    " elements, destination ", destination.numel());
  parallel_ranges(source.numel(), kChunk, [&](std::int64_t begin, std::int64_t end) {
    kernels_.elementwise->cast(source.dtype, element(source, begin), destination.dtype,
                               element(destination, begin), end - begin);
  });
}

void CpuBackend::activation_backward(Activation activation, const Tensor& pre_activation,
                                     const Tensor& dy, const Tensor& dpre, const Tensor& y) {
  constexpr const char* kName = "activation_backward";
  const DType dtype = pre_activation.dtype;
  check_floating(kName, "pre_activation", pre_activation);
  check_tensor(kName, "dy", dy, dtype, pre_activation.shape);
  check_tensor(kName, "dpre", dpre, dtype, pre_activation.shape);
  if (y) check_tensor(kName, "y", y, dtype, pre_activation.shape);
  parallel_ranges(pre_activation.numel(), kChunk, [&](std::int64_t begin, std::int64_t end) {
    kernels_.elementwise->activation_backward(activation, dtype, element(pre_activation, begin),
                                              element(dy, begin), element(dpre, begin),
                                              y ? element(y, begin) : nullptr, end - begin);
  });
}

void CpuBackend::dropout(const Dropout& dropout, const Tensor& row_keys, const Tensor& x,
                         const Tensor& y) {
  check_rank("dropout", "x", x, 2);
  check_floating("dropout", "x", x);
  check_tensor("dropout", "y", y, x.dtype, x.shape);
  if (dropout.enabled())
    check_tensor("dropout", "row_keys", row_keys, DType::s32, Shape{x.shape[0], 2});
  const std::int64_t columns = x.shape[1];
  parallel_rows(x.shape[0], columns, [&](std::int64_t begin, std::int64_t end) {
    kernels_.elementwise->dropout(
        dropout, x.dtype, dropout.enabled() ? row_keys.as<std::int32_t>() + 2 * begin : nullptr,
        end - begin, columns, element(x, begin * columns), element(y, begin * columns));
  });
}

}  // namespace bitfall
