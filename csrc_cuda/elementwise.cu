#include "core/operation_checks.h"
#include "csrc_cuda/approximate.cuh"
#include "csrc_cuda/cuda_backend.h"
#include "csrc_cuda/element.cuh"

namespace bitfall {
namespace {

template <typename From, typename To>
__global__ void cast_kernel(const From* source, To* destination, std::int64_t numel) {
  for (std::int64_t i = 8 * grid_thread(); i < numel; i += 8 * grid_threads())
    store_eight(destination, i, 0, numel, load_eight(source, i, 0, numel));
}

/// Value, first and second derivative of an activation function; kernels that need fewer of them
/// compute fewer.
struct Activated {
  float value, slope, curvature;
};

/// With the distribution of the standard normal as the CPU has it (csrc_cpu/kernels/vector.h):
/// Abramowitz & Stegun 7.1.26. Absolute error of the distribution, approximations included, below
/// 8e-7.
struct Gelu {
  __device__ static Activated evaluate(float x) {
    const float t = reciprocal_approximate(1.0f + fabsf(x) * (0.3275911f * 0.70710678f));
    float p = t * (0.5f * 1.061405429f) + 0.5f * -1.453152027f;
    p = p * t + 0.5f * 1.421413741f;
    p = p * t + 0.5f * -0.284496736f;
    p = p * t + 0.5f * 0.254829592f;
    const float e = exp2_approximate(x * x * (-0.5f * kLog2E));
    const float tail = p * t * e;
    const float cdf = x < 0.0f ? tail : 1.0f - tail;
    const float pdf = 0.39894228f * e;
    const float weighted = x * pdf;  // first, for the square of x may overflow
    return {x * cdf, cdf + weighted, 2.0f * pdf - x * weighted};
  }
};

/// 0.5 (1 + tanh(u)) = 1 / (1 + e^(-2 u)), which does not cancel where u is negative.
struct GeluTanh {
  __device__ static Activated evaluate(float x) {
    constexpr float kScale = 2 * 0.79788456f;  // 2 sqrt(2 / pi)
    const float square = x * x;
    const float exponent = kScale * kLog2E * x * (1.0f + 0.044715f * square);  // 2 u / ln 2
    const float e = exp2_approximate(-fabsf(exponent));
    const float inverse = reciprocal_approximate(1.0f + e);
    const float gate = x < 0.0f ? e * inverse : inverse;
    const float gate_slope = e * inverse * inverse;
    const float twice_u_slope = kScale * (1.0f + 3.0f * 0.044715f * square);
    const float twice_u_curvature = kScale * (6.0f * 0.044715f) * x;
    const float gate_change = gate_slope * twice_u_slope;
    const float gate_curvature =
        gate_change * twice_u_slope * (1.0f - 2.0f * gate) + gate_slope * twice_u_curvature;
    // Far outside, the slope of u is infinite where e is zero.
    return {x * gate, e == 0.0f ? gate : gate + x * gate_change,
            e == 0.0f ? 0.0f : 2.0f * gate_change + x * gate_curvature};
  }
};

struct Relu {
  __device__ static Activated evaluate(float x) {
    // x is on the side that keeps a NaN.
    return {x < 0.0f ? 0.0f : x, x > 0.0f ? 1.0f : 0.0f, 0.0f};
  }
};

struct Tanh {
  __device__ static Activated evaluate(float x) {
    const float t = tanhf(x);
    const float slope = 1.0f - t * t;
    return {t, slope, -2.0f * t * slope};
  }
};

/// Calls `visitor(TypeTag<T>{}, Function{})` with the type of `dtype` and the struct of
/// `activation`.
template <typename Visitor>
void visit_activation(DType dtype, Activation activation, Visitor&& visitor) {
  visit_dtype(dtype, [&](auto tag) {
    switch (activation) {
      case Activation::gelu:
        return visitor(tag, Gelu{});
      case Activation::gelu_tanh:
        return visitor(tag, GeluTanh{});
      case Activation::relu:
        return visitor(tag, Relu{});
      case Activation::tanh:
        return visitor(tag, Tanh{});
    }
  });
}

/// y = activation(pre).
template <typename T, typename Function>
__global__ void activation_kernel(const T* pre, T* y, std::int64_t numel) {
  for (std::int64_t i = 8 * grid_thread(); i < numel; i += 8 * grid_threads()) {
    Eight values = load_eight(pre, i, 0, numel);
#pragma unroll
    for (float& value : values.value) value = Function::evaluate(value).value;
    store_eight(y, i, 0, numel, values);
  }
}

/// dpre = dy * activation'(pre) and, unless y is null, y = activation(pre).
template <typename T, typename Function>
__global__ void activation_backward_kernel(const T* pre, const T* dy, T* dpre, T* y,
                                           std::int64_t numel) {
  for (std::int64_t i = 8 * grid_thread(); i < numel; i += 8 * grid_threads()) {
    Eight values = load_eight(pre, i, 0, numel), gradient = load_eight(dy, i, 0, numel);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const Activated activated = Function::evaluate(values.value[j]);
      values.value[j] = activated.value;
      gradient.value[j] *= activated.slope;
    }
    store_eight(dpre, i, 0, numel, gradient);
    if (y != nullptr) store_eight(y, i, 0, numel, values);
  }
}

/// dpre_tangent = activation'(pre) dy_tangent + activation''(pre) pre_tangent dy.
template <typename T, typename Function>
__global__ void activation_tangent_kernel(const T* pre, const T* pre_tangent, const T* dy,
                                          const T* dy_tangent, T* dpre_tangent,
                                          std::int64_t numel) {
  for (std::int64_t i = 8 * grid_thread(); i < numel; i += 8 * grid_threads()) {
    const Eight x = load_eight(pre, i, 0, numel), x_tangent = load_eight(pre_tangent, i, 0, numel);
    const Eight gradient = load_eight(dy, i, 0, numel);
    Eight result = load_eight(dy_tangent, i, 0, numel);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const Activated activated = Function::evaluate(x.value[j]);
      result.value[j] = result.value[j] * activated.slope +
                        gradient.value[j] * (activated.curvature * x_tangent.value[j]);
    }
    store_eight(dpre_tangent, i, 0, numel, result);
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

/// Every row of y [rows, columns] (+)= x [columns].
template <typename T>
__global__ void add_to_rows_kernel(const T* x, T* y, std::int64_t numel, std::int64_t columns,
                                   Accumulate accumulate) {
  for (std::int64_t i = grid_thread(); i < numel; i += grid_threads()) {
    const float value = widen(x[i % columns]);
    y[i] = narrow<T>(accumulate == Accumulate::yes ? widen(y[i]) + value : value);
  }
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

void CudaBackend::add_to_rows(const Tensor& x, const Tensor& y, Accumulate accumulate) {
  const std::int64_t numel = y.numel();
  if (numel == 0) return;
  const cudaStream_t stream = this->stream();
  visit_dtype(y.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    add_to_rows_kernel<T><<<blocks_for(numel), kBlockThreads, 0, stream>>>(
        device_data<const T>(x), device_data<T>(y), numel, x.numel(), accumulate);
  });
  check_launch("linear_forward");
}

void CudaBackend::activation_forward(Activation activation, const Tensor& pre_activation,
                                     const Tensor& y) {
  const std::int64_t numel = y.numel();
  if (numel == 0) return;
  const cudaStream_t stream = this->stream();
  visit_activation(y.dtype, activation, [&](auto tag, auto function) {
    using T = typename decltype(tag)::type;
    using Function = decltype(function);
    activation_kernel<T, Function><<<blocks_for((numel + 7) / 8), kBlockThreads, 0, stream>>>(
        device_data<const T>(pre_activation), device_data<T>(y), numel);
  });
  check_launch("activation");
}

void CudaBackend::activation_backward(Activation activation, const Tensor& pre_activation,
                                      const Tensor& dy, const Tensor& dpre, const Tensor& y) {
  check_activation_backward(pre_activation, dy, dpre, y);
  const std::int64_t numel = dpre.numel();
  if (numel == 0) return;
  const cudaStream_t stream = this->stream();
  visit_activation(dpre.dtype, activation, [&](auto tag, auto function) {
    using T = typename decltype(tag)::type;
    using Function = decltype(function);
    activation_backward_kernel<T, Function>
        <<<blocks_for((numel + 7) / 8), kBlockThreads, 0, stream>>>(
            device_data<const T>(pre_activation), device_data<const T>(dy), device_data<T>(dpre),
            device_data<T>(y), numel);
  });
  check_launch("activation_backward");
}

void CudaBackend::activation_backward_tangent(Activation activation, const Tensor& pre_activation,
                                              const Tensor& pre_activation_tangent,
                                              const Tensor& dy, const Tensor& dy_tangent,
                                              const Tensor& dpre_tangent) {
  check_activation_backward_tangent(pre_activation, pre_activation_tangent, dy, dy_tangent,
                                    dpre_tangent);
  const std::int64_t numel = pre_activation.numel();
  if (numel == 0) return;
  const cudaStream_t stream = this->stream();
  visit_activation(pre_activation.dtype, activation, [&](auto tag, auto function) {
    using T = typename decltype(tag)::type;
    using Function = decltype(function);
    activation_tangent_kernel<T, Function>
        <<<blocks_for((numel + 7) / 8), kBlockThreads, 0, stream>>>(
            device_data<const T>(pre_activation), device_data<const T>(pre_activation_tangent),
            device_data<const T>(dy), device_data<const T>(dy_tangent),
            device_data<T>(dpre_tangent), numel);
  });
  check_launch("activation_backward_tangent");
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
