#include "csrc_cpu/kernels/layer_norm.h"

#include "csrc_cpu/kernels/vector.h"

namespace bitfall::BITFALL_ISA {
namespace {

template <typename T>
BITFALL_INLINE T* row_of(const Tensor& tensor, std::int64_t row, std::int64_t columns) {
  return tensor.data == nullptr ? nullptr : static_cast<T*>(tensor.data) + row * columns;
}

/// Sum of `value(index, count)` over a row; lanes from `count` on must be zero.
template <typename Value>
BITFALL_INLINE float sum_row(std::int64_t columns, Value&& value) {
  Floats total{};
  for_each_vector(columns, [&](std::int64_t i, std::int64_t count) { total += value(i, count); });
  return sum(total);
}

/// sum = dropout(x) + residual as stored, and its total.
template <typename T>
BITFALL_INLINE float add_residual(const T* x, const T* residual, DropoutMask& mask,
                                  const std::int32_t* row_key, std::int64_t columns, T* out) {
  Floats total{};
  for_each_block(columns, [&](std::int64_t begin, std::int64_t size) {
    const float* multipliers = mask.block(row_key, begin);
    for_each_vector(size, [&](std::int64_t offset, std::int64_t count) {
      const std::int64_t i = begin + offset;
      Floats value = load_lanes(x + i, count) * load(multipliers + offset);
      if (residual != nullptr) value += load_lanes(residual + i, count);
      store_lanes(out + i, value, count);
      // The statistics are those of the stored value: backward sees nothing else.
      total += load_lanes(out + i, count);
    });
  });
  return sum(total);
}

template <typename T>
BITFALL_INLINE void forward_row(const LayerNormForward& args, std::int64_t row,
                                std::int64_t columns, DropoutMask& input_mask,
                                DropoutMask& output_mask) {
  const std::int32_t* row_key = row_of<const std::int32_t>(args.row_keys, row, 2);
  T* s = row_of<T>(args.sum, row, columns);
  const float total =
      add_residual(row_of<const T>(args.x, row, columns),
                   row_of<const T>(args.residual, row, columns), input_mask, row_key, columns, s);
  const float mean = total / static_cast<float>(columns);
  const float squares = sum_row(columns, [&](std::int64_t i, std::int64_t count) {
    const Floats centred = load_lanes(s + i, count) - mean;
    return first_lanes(centred * centred, count);
  });
  const float variance = squares / static_cast<float>(columns);
  const float rstd = 1.0f / __builtin_sqrtf(variance + args.epsilon);
  float* statistics = row_of<float>(args.mean_rstd, row, 2);
  statistics[0] = mean;
  statistics[1] = rstd;

  const T* gamma = row_of<const T>(args.gamma, 0, columns);
  const T* beta = row_of<const T>(args.beta, 0, columns);
  T* y = row_of<T>(args.y, row, columns);
  for_each_block(columns, [&](std::int64_t begin, std::int64_t size) {
    const float* multipliers = output_mask.block(row_key, begin);
    for_each_vector(size, [&](std::int64_t offset, std::int64_t count) {
      const std::int64_t i = begin + offset;
      const Floats normalized = (load_lanes(s + i, count) - mean) * rstd;
      const Floats scaled = normalized * load_lanes(gamma + i, count) + load_lanes(beta + i, count);
      store_lanes(y + i, scaled * load(multipliers + offset), count);
    });
  });
}

void forward(const LayerNormForward& args, std::int64_t begin, std::int64_t end) {
  const std::int64_t columns = args.x.shape[1];
  dispatch(args.x.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    DropoutMask input_mask(args.input_dropout), output_mask(args.output_dropout);
    for (std::int64_t row = begin; row < end; ++row)
      forward_row<T>(args, row, columns, input_mask, output_mask);
  });
}

struct RowMeans {
  float gradient;             ///< mean of g = gamma * dy after the output dropout's mask
  float gradient_normalized;  ///< mean of g * normalized
};

/// First pass over a row: adds its share of dgamma and dbeta.
template <typename T>
BITFALL_INLINE RowMeans reduce_row(const LayerNormBackward& args, std::int64_t row,
                                   std::int64_t columns, DropoutMask& output_mask, float* dgamma,
                                   float* dbeta) {
  const std::int32_t* row_key = row_of<const std::int32_t>(args.row_keys, row, 2);
  const float* statistics = row_of<const float>(args.mean_rstd, row, 2);
  const T* dy = row_of<const T>(args.dy, row, columns);
  const T* s = row_of<const T>(args.sum, row, columns);
  const T* gamma = row_of<const T>(args.gamma, 0, columns);
  Floats total{}, total_normalized{};
  for_each_block(columns, [&](std::int64_t begin, std::int64_t size) {
    const float* multipliers = output_mask.block(row_key, begin);
    for_each_vector(size, [&](std::int64_t offset, std::int64_t count) {
      const std::int64_t i = begin + offset;
      const Floats gradient = load_lanes(dy + i, count) * load(multipliers + offset);
      const Floats normalized = (load_lanes(s + i, count) - statistics[0]) * statistics[1];
      store_lanes(dgamma + i, load_lanes(dgamma + i, count) + gradient * normalized, count);
      store_lanes(dbeta + i, load_lanes(dbeta + i, count) + gradient, count);
      const Floats g = gradient * load_lanes(gamma + i, count);
      total += g;
      total_normalized += g * normalized;
    });
  });
  const auto size = static_cast<float>(columns);
  return {sum(total) / size, sum(total_normalized) / size};
}

/// Second pass: dresidual = rstd * (g - mean(g) - normalized * mean(g * normalized)), and dx.
template <typename T>
BITFALL_INLINE void gradient_row(const LayerNormBackward& args, std::int64_t row,
                                 std::int64_t columns, const RowMeans& means,
                                 DropoutMask& output_mask, DropoutMask& input_mask) {
  const std::int32_t* row_key = row_of<const std::int32_t>(args.row_keys, row, 2);
  const float* statistics = row_of<const float>(args.mean_rstd, row, 2);
  const T* dy = row_of<const T>(args.dy, row, columns);
  const T* s = row_of<const T>(args.sum, row, columns);
  const T* gamma = row_of<const T>(args.gamma, 0, columns);
  T* dresidual = row_of<T>(args.dresidual, row, columns);
  T* dx = row_of<T>(args.dx, row, columns);
  for_each_block(columns, [&](std::int64_t begin, std::int64_t size) {
    const float* output = output_mask.block(row_key, begin);
    const float* input = dx != nullptr ? input_mask.block(row_key, begin) : nullptr;
    for_each_vector(size, [&](std::int64_t offset, std::int64_t count) {
      const std::int64_t i = begin + offset;
      const Floats g =
          load_lanes(dy + i, count) * load(output + offset) * load_lanes(gamma + i, count);
      const Floats normalized = (load_lanes(s + i, count) - statistics[0]) * statistics[1];
      const Floats gradient =
          (g - means.gradient - normalized * means.gradient_normalized) * statistics[1];
      store_lanes(dresidual + i, gradient, count);
      if (dx != nullptr) store_lanes(dx + i, gradient * load(input + offset), count);
    });
  });
}

void backward(const LayerNormBackward& args, std::int64_t begin, std::int64_t end, float* dgamma,
              float* dbeta) {
  const std::int64_t columns = args.dy.shape[1];
  dispatch(args.dy.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    DropoutMask input_mask(args.input_dropout), output_mask(args.output_dropout);
    for (std::int64_t row = begin; row < end; ++row) {
      const RowMeans means = reduce_row<T>(args, row, columns, output_mask, dgamma, dbeta);
      gradient_row<T>(args, row, columns, means, output_mask, input_mask);
    }
  });
}

// --- tangents; r stands for rstd, a quantity's tangent for its derivative along the direction

/// A row of what was normalised, n = (sum - mean) r, and of its tangent.
template <typename T>
struct NormalizedRow {
  const T *sum, *sum_tangent;
  float mean, rstd;
  float mean_tangent;     ///< mean(sum_tangent)
  float mean_correlated;  ///< mean(n sum_tangent) = -rstd_tangent / rstd^2

  BITFALL_INLINE NormalizedRow(const Tensor& mean_rstd, const Tensor& sums,
                               const Tensor& sum_tangents, std::int64_t row, std::int64_t columns)
      : sum(row_of<const T>(sums, row, columns)),
        sum_tangent(row_of<const T>(sum_tangents, row, columns)) {
    const float* statistics = row_of<const float>(mean_rstd, row, 2);
    mean = statistics[0];
    rstd = statistics[1];
    Floats total{}, correlated{};
    for_each_vector(columns, [&](std::int64_t i, std::int64_t count) {
      const Floats tangent = load_lanes(sum_tangent + i, count);
      total += tangent;
      correlated += tangent * value(i, count);
    });
    const auto size = static_cast<float>(columns);
    mean_tangent = BITFALL_ISA::sum(total) / size;
    mean_correlated = BITFALL_ISA::sum(correlated) / size;
  }

  /// n from column i on. Lanes behind the row are not zero.
  BITFALL_INLINE Floats value(std::int64_t i, std::int64_t count) const {
    return (load_lanes(sum + i, count) - mean) * rstd;
  }
  /// Tangent of n = `normalized`.
  BITFALL_INLINE Floats tangent(std::int64_t i, std::int64_t count, Floats normalized) const {
    return (load_lanes(sum_tangent + i, count) - mean_tangent - normalized * mean_correlated) *
           rstd;
  }
};

template <typename T>
BITFALL_INLINE void forward_tangent_row(const LayerNormForwardTangent& args, std::int64_t row,
                                        std::int64_t columns) {
  const NormalizedRow<T> n(args.mean_rstd, args.sum, args.sum_tangent, row, columns);
  const T* gamma = row_of<const T>(args.gamma, 0, columns);
  const T* gamma_tangent = row_of<const T>(args.gamma_tangent, 0, columns);
  const T* beta_tangent = row_of<const T>(args.beta_tangent, 0, columns);
  T* y_tangent = row_of<T>(args.y_tangent, row, columns);
  for_each_vector(columns, [&](std::int64_t i, std::int64_t count) {
    const Floats normalized = n.value(i, count);
    Floats tangent = load_lanes(gamma + i, count) * n.tangent(i, count, normalized);
    if (gamma_tangent != nullptr) {
      tangent +=
          normalized * load_lanes(gamma_tangent + i, count) + load_lanes(beta_tangent + i, count);
    }
    store_lanes(y_tangent + i, tangent, count);
  });
}

void forward_tangent(const LayerNormForwardTangent& args, std::int64_t begin, std::int64_t end) {
  const std::int64_t columns = args.sum.shape[1];
  dispatch(args.sum.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    for (std::int64_t row = begin; row < end; ++row) forward_tangent_row<T>(args, row, columns);
  });
}

/// A row of g = dy gamma, the gradient of n, and of its tangent.
template <typename T>
struct GradientRow {
  const T *dy, *dy_tangent, *gamma, *gamma_tangent;

  BITFALL_INLINE GradientRow(const LayerNormBackwardTangent& args, std::int64_t row,
                             std::int64_t columns)
      : dy(row_of<const T>(args.dy, row, columns)),
        dy_tangent(row_of<const T>(args.dy_tangent, row, columns)),
        gamma(row_of<const T>(args.gamma, 0, columns)),
        gamma_tangent(row_of<const T>(args.gamma_tangent, 0, columns)) {}

  BITFALL_INLINE Floats value(std::int64_t i, std::int64_t count) const {
    return load_lanes(dy + i, count) * load_lanes(gamma + i, count);
  }
  BITFALL_INLINE Floats tangent(std::int64_t i, std::int64_t count) const {
    Floats result = load_lanes(dy_tangent + i, count) * load_lanes(gamma + i, count);
    if (gamma_tangent != nullptr)
      result += load_lanes(dy + i, count) * load_lanes(gamma_tangent + i, count);
    return result;
  }
};

/// The means of a row's gradients, and the tangents of these means.
struct TangentMeans {
  RowMeans value, tangent;
};

/// First pass over a row's gradients: their means, and the row's share of dgamma and dbeta.
template <typename T>
BITFALL_INLINE TangentMeans reduce_tangent_row(const NormalizedRow<T>& n, const GradientRow<T>& g,
                                               std::int64_t columns, float* dgamma_tangent,
                                               float* dbeta_tangent) {
  Floats total{}, total_normalized{}, tangents{}, tangents_normalized{};
  for_each_vector(columns, [&](std::int64_t i, std::int64_t count) {
    const Floats normalized = n.value(i, count);
    const Floats normalized_tangent = n.tangent(i, count, normalized);
    const Floats gradient = g.value(i, count), gradient_tangent = g.tangent(i, count);
    total += gradient;
    total_normalized += gradient * normalized;
    tangents += gradient_tangent;
    tangents_normalized += gradient_tangent * normalized + gradient * normalized_tangent;
    if (dgamma_tangent == nullptr) return;
    const Floats dy = load_lanes(g.dy + i, count), dy_tangent = load_lanes(g.dy_tangent + i, count);
    const Floats dgamma = dy_tangent * normalized + dy * normalized_tangent;
    store_lanes(dgamma_tangent + i, load_lanes(dgamma_tangent + i, count) + dgamma, count);
    store_lanes(dbeta_tangent + i, load_lanes(dbeta_tangent + i, count) + dy_tangent, count);
  });
  const auto size = static_cast<float>(columns);
  return {{sum(total) / size, sum(total_normalized) / size},
          {sum(tangents) / size, sum(tangents_normalized) / size}};
}

/// Second pass: the tangent of dsum = r u, u = g - mean(g) - n mean(g n), by the product rule.
template <typename T>
BITFALL_INLINE void gradient_tangent_row(const NormalizedRow<T>& n, const GradientRow<T>& g,
                                         std::int64_t columns, const TangentMeans& means,
                                         T* dsum_tangent) {
  const float rstd_change = -n.rstd * n.mean_correlated;  // rstd_tangent / rstd
  for_each_vector(columns, [&](std::int64_t i, std::int64_t count) {
    const Floats normalized = n.value(i, count);
    const Floats u =
        g.value(i, count) - means.value.gradient - normalized * means.value.gradient_normalized;
    const Floats u_tangent = g.tangent(i, count) - means.tangent.gradient -
                             n.tangent(i, count, normalized) * means.value.gradient_normalized -
                             normalized * means.tangent.gradient_normalized;
    store_lanes(dsum_tangent + i, (u * rstd_change + u_tangent) * n.rstd, count);
  });
}

void backward_tangent(const LayerNormBackwardTangent& args, std::int64_t begin, std::int64_t end,
                      float* dgamma_tangent, float* dbeta_tangent) {
  const std::int64_t columns = args.sum.shape[1];
  dispatch(args.sum.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    for (std::int64_t row = begin; row < end; ++row) {
      const NormalizedRow<T> n(args.mean_rstd, args.sum, args.sum_tangent, row, columns);
      const GradientRow<T> g(args, row, columns);
      const TangentMeans means = reduce_tangent_row(n, g, columns, dgamma_tangent, dbeta_tangent);
      gradient_tangent_row(n, g, columns, means, row_of<T>(args.dsum_tangent, row, columns));
    }
  });
}

}  // namespace

extern const LayerNormKernels layer_norm_kernels;
const LayerNormKernels layer_norm_kernels{forward, backward, forward_tangent, backward_tangent};

}  // namespace bitfall::BITFALL_ISA
