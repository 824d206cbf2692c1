#include "csrc_cpu/kernels/elementwise.h"

#include "csrc_cpu/kernels/vector.h"

namespace bitfall::BITFALL_ISA {
namespace {

/// Value, first and second derivative of an activation function.
struct Activated {
  Floats value, slope, curvature;
};

struct Gelu {
  BITFALL_INLINE static Activated evaluate(Floats x) {
    const Normal n = normal(x);
    const Floats weighted = x * n.pdf;  // first, for the square of x may overflow
    return {x * n.cdf, n.cdf + weighted, 2.0f * n.pdf - x * weighted};
  }
};

/// 0.5 (1 + tanh(u)) = 1 / (1 + e^(-2 u)), which does not cancel where u is negative.
struct GeluTanh {
  BITFALL_INLINE static Activated evaluate(Floats x) {
    constexpr float kScale = 2 * 0.79788456f;  // 2 sqrt(2 / pi)
    const Floats square = x * x;
    const Floats twice_u = kScale * x * (1.0f + 0.044715f * square);
    const Floats e = exp(-abs(twice_u));
    const Floats inverse = 1.0f / (1.0f + e);
    const Floats gate = twice_u < 0.0f ? e * inverse : inverse;
    const Floats twice_u_slope = kScale * (1.0f + 3.0f * 0.044715f * square);
    const Floats gate_slope = e * inverse * inverse;
    const Floats twice_u_curvature = kScale * (6.0f * 0.044715f) * x;
    const Floats gate_change = gate_slope * twice_u_slope;
    const Floats gate_curvature =
        gate_change * twice_u_slope * (1.0f - 2.0f * gate) + gate_slope * twice_u_curvature;
    // Far outside, the slope of u is infinite where e is zero.
    return {x * gate, e == 0.0f ? gate : gate + x * gate_slope * twice_u_slope,
            e == 0.0f ? Floats{} : 2.0f * gate_change + x * gate_curvature};
  }
};

struct Relu {
  BITFALL_INLINE static Activated evaluate(Floats x) {
    // x is on the side that keeps a NaN.
    return {x < 0.0f ? Floats{} : x, x > 0.0f ? broadcast(1.0f) : Floats{}, Floats{}};
  }
};

struct Tanh {
  BITFALL_INLINE static Activated evaluate(Floats x) {
    const Floats t = tanh(x);
    const Floats slope = 1.0f - t * t;
    return {t, slope, -2.0f * t * slope};
  }
};

/// Calls `function(Function{})` with the struct of `activation`.
template <typename Function>
BITFALL_INLINE void dispatch(Activation activation, Function&& function) {
  switch (activation) {
    case Activation::gelu:
      return function(Gelu{});
    case Activation::gelu_tanh:
      return function(GeluTanh{});
    case Activation::relu:
      return function(Relu{});
    case Activation::tanh:
      return function(Tanh{});
  }
}

void cast(DType from, const void* source, DType to, void* destination, std::int64_t numel) {
  dispatch(from, [&](auto source_tag) {
    dispatch(to, [&](auto destination_tag) {
      const auto* in = static_cast<const typename decltype(source_tag)::type*>(source);
      auto* out = static_cast<typename decltype(destination_tag)::type*>(destination);
      for_each_vector(numel, [&](std::int64_t i, std::int64_t count) {
        store_lanes(out + i, load_lanes(in + i, count), count);
      });
    });
  });
}

void activation_forward(Activation activation, DType dtype, const void* pre_activation, void* y,
                        std::int64_t numel) {
  dispatch(activation, [&](auto function) {
    dispatch(dtype, [&](auto tag) {
      using T = typename decltype(tag)::type;
      const auto* in = static_cast<const T*>(pre_activation);
      auto* out = static_cast<T*>(y);
      for_each_vector(numel, [&](std::int64_t i, std::int64_t count) {
        store_lanes(out + i, function.evaluate(load_lanes(in + i, count)).value, count);
      });
    });
  });
}

void activation_backward(Activation activation, DType dtype, const void* pre_activation,
                         const void* dy, void* dpre, void* y, std::int64_t numel) {
  dispatch(activation, [&](auto function) {
    dispatch(dtype, [&](auto tag) {
      using T = typename decltype(tag)::type;
      const auto* in = static_cast<const T*>(pre_activation);
      const auto* gradient = static_cast<const T*>(dy);
      auto* out = static_cast<T*>(dpre);
      auto* again = static_cast<T*>(y);
      for_each_vector(numel, [&](std::int64_t i, std::int64_t count) {
        const Activated activated = function.evaluate(load_lanes(in + i, count));
        store_lanes(out + i, load_lanes(gradient + i, count) * activated.slope, count);
        if (again != nullptr) store_lanes(again + i, activated.value, count);
      });
    });
  });
}

void activation_backward_tangent(Activation activation, DType dtype, const void* pre_activation,
                                 const void* pre_activation_tangent, const void* dy,
                                 const void* dy_tangent, void* dpre_tangent, std::int64_t numel) {
  dispatch(activation, [&](auto function) {
    dispatch(dtype, [&](auto tag) {
      using T = typename decltype(tag)::type;
      const auto* in = static_cast<const T*>(pre_activation);
      const auto* in_tangent = static_cast<const T*>(pre_activation_tangent);
      const auto* gradient = static_cast<const T*>(dy);
      const auto* gradient_tangent = static_cast<const T*>(dy_tangent);
      auto* out = static_cast<T*>(dpre_tangent);
      for_each_vector(numel, [&](std::int64_t i, std::int64_t count) {
        const Activated activated = function.evaluate(load_lanes(in + i, count));
        const Floats slope_tangent = activated.curvature * load_lanes(in_tangent + i, count);
        store_lanes(out + i,
                    load_lanes(gradient_tangent + i, count) * activated.slope +
                        load_lanes(gradient + i, count) * slope_tangent,
                    count);
      });
    });
  });
}

void dropout(const Dropout& dropout, DType dtype, const std::int32_t* row_keys, std::int64_t rows,
             std::int64_t columns, const void* x, void* y) {
  dispatch(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    DropoutMask mask(dropout);
    for (std::int64_t row = 0; row < rows; ++row) {
      const T* in = static_cast<const T*>(x) + row * columns;
      T* out = static_cast<T*>(y) + row * columns;
      for_each_block(columns, [&](std::int64_t begin, std::int64_t size) {
        const float* multipliers = mask.block(row_keys + 2 * row, begin);
        for_each_vector(size, [&](std::int64_t i, std::int64_t count) {
          const Floats kept = load_lanes(in + begin + i, count) * load(multipliers + i);
          store_lanes(out + begin + i, kept, count);
        });
      });
    }
  });
}

void column_sums(DType dtype, const void* x, std::int64_t rows, std::int64_t columns, float* sums) {
  dispatch(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto* in = static_cast<const T*>(x);
    for (std::int64_t row = 0; row < rows; ++row) {
      for_each_vector(columns, [&](std::int64_t i, std::int64_t count) {
        const Floats sum = load_lanes(sums + i, count) + load_lanes(in + row * columns + i, count);
        store_lanes(sums + i, sum, count);
      });
    }
  });
}

void add_three(DType dtype, const void* a, const void* b, const void* c, void* y,
               std::int64_t numel) {
  dispatch(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    for_each_vector(numel, [&](std::int64_t i, std::int64_t count) {
      const Floats sum = load_lanes(static_cast<const T*>(a) + i, count) +
                         load_lanes(static_cast<const T*>(b) + i, count) +
                         load_lanes(static_cast<const T*>(c) + i, count);
      store_lanes(static_cast<T*>(y) + i, sum, count);
    });
  });
}

void accumulate(DType dtype, const void* x, float* destination, std::int64_t numel) {
  column_sums(dtype, x, 1, numel, destination);
}

}  // namespace

extern const ElementwiseKernels elementwise_kernels;
const ElementwiseKernels elementwise_kernels{
    cast,    activation_forward, activation_backward, activation_backward_tangent,
    dropout, column_sums,        add_three,           accumulate};

}  // namespace bitfall::BITFALL_ISA
