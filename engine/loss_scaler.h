// LossScaler: the factor that keeps fp16 gradients away from zero and infinity.
#pragma once

#include <cstdint>

#include "engine/config.h"

namespace bitfall {

/// Everything that a checkpoint keeps of the scaler.
struct LossScalerState {
  double scale = 1.0;
  std::int64_t iteration = 0;
  std::int64_t last_overflow_iteration = -1;
  int hysteresis = 1;
};

class LossScaler {
 public:
  explicit LossScaler(const LossScaleConfig& config);

  double scale() const { return state_.scale; }
  /// Gradients overflowed, the step is skipped: half the scale once `hysteresis` overflows are used
  /// up. Throws TrainingError if a dynamic scale already is at its minimum.
  /// Source: deepspeed/runtime/fp16/loss_scaler.py, DynamicLossScaler.update_scale.
  void on_overflow();
  /// Gradients were finite: twice the scale after each loss_scale_window steps without overflow.
  void on_success();

  const LossScalerState& state() const { return state_; }
  /// Throws CheckpointError for values that no run produces.
  void restore(const LossScalerState& state);

 private:
  LossScaleConfig config_;
  LossScalerState state_;
};

}  // namespace bitfall
