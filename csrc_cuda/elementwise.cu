#include "core/operation_checks.h"
#include "csrc_cuda/cuda_backend.h"
#include "csrc_cuda/element.cuh"

namespace bitfall {
namespace {

template <typename From, typename To>
__global__ void cast_kernel(const From* source, To* destination, std::int64_t numel) {
  for (std::int64_t i = 8 * grid_thread(); i < numel; i += 8 * grid_threads())
    store_eight(destination, i, 0, numel, load_eight(source, i, 0, numel));
}

/// Value and derivative of an activation function.
struct Activated {
  float value, slope;
};

__device__ Activated gelu(float x) {
  const float cdf = normcdff(x);
  const float pdf = 0.39894228f * expf(-0.5f * x * x);
  return {x * cdf, cdf + x * pdf};
}

/// 0.5 (1 + tanh(u)) = 1 / (1 + e^(-2 u)), which does not cancel where u is negative.
__device__ Activated gelu_tanh(float x) {
  constexpr float kScale = 2 * 0.79788456f;  // 2 sqrt(2 / pi)
  const float square = x * x;
  const float twice_u = kScale * x * (1.0f + 0.044715f * square);
  const float e = expf(-fabsf(twice_u));
  const float inverse = 1.0f / (1.0f + e);
  const float gate = twice_u < 0.0f ? e * inverse : inverse;
  // Far outside, the slope of u is infinite where e is zero.
  const float twice_u_slope = kScale * (1.0f + 3.0f * 0.044715f * square);
  const float bend = e == 0.0f ? 0.0f : x * (e * inverse * inverse) * twice_u_slope;
  return {x * gate, gate + bend};
}

__device__ Activated activate(Activation activation, float x) {
  switch (activation) {
    case Activation::gelu:
      return gelu(x);
    case Activation::gelu_tanh:
      return gelu_tanh(x);
    case Activation::relu:
      // x is on the side that keeps a NaN.
      return {x < 0.0f ? 0.0f : x, x > 0.0f ? 1.0f : 0.0f};
    case Activation::tanh:
      break;
  }
  const float t = tanhf(x);
  return {t, 1.0f - t * t};
}

/// y = activation(pre) and dpre = dy * activation'(pre), each where its pointer is not null.
template <typename T>
__global__ void activation_kernel(Activation activation, const T* pre, const T* dy, T* dpre, T* y,
                                  std::int64_t numel) {
  for (std::int64_t i = 8 * grid_thread(); i < numel; i += 8 * grid_threads()) {
    const Eight x = load_eight(pre, i, 0, numel);
    Eight gradient{};
    if (dpre != nullptr) gradient = load_eight(dy, i, 0, numel);
    Eight value;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const Activated activated = activate(activation, x.value[j]);
      value.value[j] = activated.value;
      gradient.value[j] *= activated.slope;
    }
    if (dpre != nullptr) store_eight(dpre, i, 0, numel, gradient);
    if (y != nullptr) store_eight(y, i, 0, numel, value);
  }
}

template <typename T>
__global__ void dropout_kernel(Dropout dropout, const std::int32_t* row_keys, const T* x, T* y,
                               std::int64_t rows, std::int64_t columns) {
  const std::int64_t items = (columns + 127) / 128 * 16;  // of one row
  for (std::int64_t i = grid_thread(); i < rows * items; i += grid_threads()) {
    const std::int64_t row = i / items, first = first_column(i % items);
    const Eight multipliers = row_multipliers(dropout, row_keys, row, first);
    const Eight values = load_columns(x + row * columns, first, columns);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const std::int64_t column = first + 16 * j;
      if (column < columns)
        y[row * columns + column] = narrow<T>(values.value[j] * multipliers.value[j]);
    }
  }
}

template <typename T>
void launch_activation(Activation activation, const Tensor& pre, const Tensor& dy,
                       const Tensor& dpre, const Tensor& y, cudaStream_t stream) {
  const std::int64_t numel = pre.numel();
  activation_kernel<T><<<blocks_for((numel + 7) / 8), kBlockThreads, 0, stream>>>(
      activation, device_data<const T>(pre), device_data<const T>(dy), device_data<T>(dpre),
      device_data<T>(y), numel);
  check_launch("activation");
}

}  // namespace

void CudaBackend::cast(const Tensor& source, const Tensor& destination) {
  check_cast(source, destination);
  const std::int64_t numel = source.numel();
  if (numel == 0) return;
  const cudaStream_t stream = this->stream();
  visit_dtype(source.dtype, [&](auto from) {
    using From = typename decltype(from)::type;
    visit_dtype(destination.dtype, [&](auto to) {
      using To = typename decltype(to)::type;
      cast_kernel<From, To><<<blocks_for((numel + 7) / 8), kBlockThreads, 0, stream>>>(
          device_data<const From>(source), device_data<To>(destination), numel);
    });
  });
  check_launch("cast");
}

void CudaBackend::activation_forward(Activation activation, const Tensor& pre_activation,
                                     const Tensor& y) {
  if (y.numel() == 0) return;
  visit_dtype(y.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    launch_activation<T>(activation, pre_activation, {}, {}, y, stream());
  });
}

void CudaBackend::activation_backward(Activation activation, const Tensor& pre_activation,
                                      const Tensor& dy, const Tensor& dpre, const Tensor& y) {
  check_activation_backward(pre_activation, dy, dpre, y);
  if (dpre.numel() == 0) return;
  visit_dtype(dpre.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    launch_activation<T>(activation, pre_activation, dy, dpre, y, stream());
  });
}

void CudaBackend::dropout(const Dropout& dropout, const Tensor& row_keys, const Tensor& x,
                          const Tensor& y) {
  check_dropout(dropout, row_keys, x, y);
  if (x.numel() == 0) return;
  const std::int64_t rows = x.shape[0], columns = x.shape[1];
  const cudaStream_t stream = this->stream();
  visit_dtype(x.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    dropout_kernel<T>
        <<<blocks_for(rows * ((columns + 127) / 128 * 16)), kBlockThreads, 0, stream>>>(
            dropout, device_data<const std::int32_t>(row_keys), device_data<const T>(x),
            device_data<T>(y), rows, columns);
  });
  check_launch("dropout");
}

}  // namespace bitfall
