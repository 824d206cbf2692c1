// UpdateDecision: whether a step's gradient updates the weights, and with which factor. The one
// definition of its arithmetic, for the CPU and for kernels.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "core/dtype.h"

namespace bitfall {

/// What the host knows before the gradient is there.
struct UpdateLimits {
  double loss_scale = 1;         ///< what the gradient was multiplied by
  double gradient_clipping = 0;  ///< largest norm of the unscaled gradient; 0 for none
};

/// Lives where the gradient lives: Backend::decide_update writes it, adam_update reads it.
struct UpdateDecision {
  double grad_norm = 0;           ///< of the unscaled gradient, before clipping
  float loss = 0;                 ///< mean over the global batch
  float gradient_multiplier = 1;  ///< unscale and clip in one factor
  std::int32_t skip = 0;          ///< 1: the norm is not finite, nothing may be updated
};

/// `squared_norm`: sum of squares of the scaled gradient. In f64, only operations that IEEE 754
/// rounds exactly, so that every device decides alike.
BITFALL_INLINE UpdateDecision decided_update(float loss, double squared_norm,
                                             const UpdateLimits& limits) {
  UpdateDecision decision;
  decision.loss = loss;
  decision.grad_norm = std::sqrt(squared_norm) / limits.loss_scale;
  decision.skip = decision.grad_norm <= std::numeric_limits<double>::max() ? 0 : 1;
  double clip = 1;
  if (limits.gradient_clipping > 0) {
    // The 1e-6 is DeepSpeed's and PyTorch's.
    const double factor = limits.gradient_clipping / (decision.grad_norm + 1e-6);
    if (factor < clip) clip = factor;
  }
  decision.gradient_multiplier = static_cast<float>(clip / limits.loss_scale);
  return decision;
}

}  // namespace bitfall
