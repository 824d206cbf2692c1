#include "engine/loss_scaler.h"

#include <algorithm>
#include <cmath>

#include "core/error.h"

namespace bitfall {
namespace {
constexpr double kScaleFactor = 2.0;
}  // namespace

LossScaler::LossScaler(const LossScaleConfig& config)
    : config_(config), state_{config.initial_scale, 0, -1, config.hysteresis} {}

void LossScaler::on_overflow() {
  if (!config_.dynamic) return;
  if (state_.hysteresis <= 1) {
    check<TrainingError>(state_.scale > config_.min_loss_scale,
                         "gradients overflow fp16 although the loss scale is at its minimum (",
                         config_.min_loss_scale,
                         "): the training diverges; lower the learning rate, set "
                         "gradient_clipping, or train in bf16");
    state_.scale = std::max(state_.scale / kScaleFactor, config_.min_loss_scale);
  } else {
    --state_.hysteresis;
  }
  state_.last_overflow_iteration = state_.iteration;
  ++state_.iteration;
}

void LossScaler::on_success() {
  if (!config_.dynamic) return;
  if (config_.consecutive_hysteresis) state_.hysteresis = config_.hysteresis;
  if ((state_.iteration - state_.last_overflow_iteration) % config_.loss_scale_window == 0) {
    if (!config_.consecutive_hysteresis) state_.hysteresis = config_.hysteresis;
    state_.scale *= kScaleFactor;
  }
  ++state_.iteration;
}

void LossScaler::restore(const LossScalerState& state) {
  check<CheckpointError>(
      std::isfinite(state.scale) && state.scale > 0 && state.iteration >= 0 &&
          state.last_overflow_iteration >= -1 && state.last_overflow_iteration <= state.iteration &&
          state.hysteresis >= 0 && state.hysteresis <= config_.hysteresis,
      "loss scaler: scale ", state.scale, ", iteration ", state.iteration, ", last overflow ",
      state.last_overflow_iteration, ", hysteresis ", state.hysteresis, " cannot be");
  state_ = state;
}

}  // namespace bitfall
