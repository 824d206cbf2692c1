// LrSchedule: learning rate as a pure function of the optimizer step.
#pragma once

#include <cstdint>

#include "engine/config.h"

namespace bitfall {

class LrSchedule {
 public:
  /// `base_rate` is optimizer.params.lr. Throws ConfigError if the schedule needs a number of
  /// training steps that the config does not have.
  LrSchedule(const SchedulerConfig& config, double base_rate);

  /// Rate of the update that follows `completed_steps` updates (skipped steps do not count): 0 for
  /// the first.
  ///
  /// As in DeepSpeed and in Hugging Face's LambdaLR, the scheduler is stepped after the update, so
  /// a warmup from 0 makes the first update with rate 0. DeepSpeed's WarmupLR family lags by one
  /// more: with last_batch_iteration = completed_steps - 1, the first two updates of a log warmup
  /// have the minimum rate.
  /// Sources: deepspeed/runtime/lr_schedules.py; transformers/optimization.py.
  double rate(std::int64_t completed_steps) const;

 private:
  using Formula = double (*)(const SchedulerConfig& config, double base_rate, double step);

  SchedulerConfig config_;
  double base_rate_;
  Formula formula_;
};

}  // namespace bitfall
