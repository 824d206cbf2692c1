#include "engine/lr_schedule.h"

#include <algorithm>
#include <cmath>
#include <numbers>
#include <string_view>

#include "core/error.h"

namespace bitfall {
namespace {

using std::numbers::pi;

double param(const SchedulerConfig& config, const char* key) { return config.params.at(key); }

// --- Hugging Face: factors of the base rate

/// Linear warmup, then `after` of the share of the remaining steps that has passed.
template <typename After>
double warm_up_then(const SchedulerConfig& config, double step, After after) {
  const double warmup = param(config, "num_warmup_steps");
  if (step < warmup) return step / std::max(1.0, warmup);
  const double total = param(config, "num_training_steps");
  return after((step - warmup) / std::max(1.0, total - warmup));
}

double linear(const SchedulerConfig& config, double base_rate, double step) {
  // Written as the remaining share so that the last bits agree with the original.
  const double warmup = param(config, "num_warmup_steps");
  if (step < warmup) return base_rate * (step / std::max(1.0, warmup));
  const double total = param(config, "num_training_steps");
  return base_rate * std::max(0.0, (total - step) / std::max(1.0, total - warmup));
}

double cosine(const SchedulerConfig& config, double base_rate, double step) {
  return base_rate * warm_up_then(config, step, [](double progress) {
           return std::max(0.0, 0.5 * (1.0 + std::cos(pi * progress)));
         });
}

double cosine_with_restarts(const SchedulerConfig& config, double base_rate, double step) {
  return base_rate * warm_up_then(config, step, [](double progress) {
           return progress >= 1.0 ? 0.0 : std::max(0.0, 0.5 * (1.0 + std::cos(pi * progress)));
         });
}

double polynomial(const SchedulerConfig& config, double base_rate, double step) {
  constexpr double kEndRate = 1e-7;  // power 1, as Hugging Face's defaults
  const double warmup = param(config, "num_warmup_steps");
  const double total = param(config, "num_training_steps");
  if (step < warmup) return base_rate * (step / std::max(1.0, warmup));
  if (step > total || total == warmup) return kEndRate;
  const double remaining = 1.0 - (step - warmup) / (total - warmup);
  return (base_rate - kEndRate) * remaining + kEndRate;
}

double constant(const SchedulerConfig&, double base_rate, double) { return base_rate; }

double constant_with_warmup(const SchedulerConfig& config, double base_rate, double step) {
  const double warmup = param(config, "num_warmup_steps");
  return base_rate * (step < warmup ? step / std::max(1.0, warmup) : 1.0);
}

double inverse_sqrt(const SchedulerConfig& config, double base_rate, double step) {
  const double warmup = param(config, "num_warmup_steps");
  if (step < warmup) return base_rate * (step / std::max(1.0, warmup));
  const double timescale = warmup > 0 ? warmup : 10000.0;
  return base_rate / std::sqrt((step + timescale - warmup) / timescale);
}

// --- DeepSpeed: `step` counts scheduler steps, last = step - 1 is its last_batch_iteration

/// Share of the warmup that is done, log(last + 1) / log(warmup_num_steps) or linear.
double warmup_share(const SchedulerConfig& config, double last, double warmup_num_steps) {
  if (config.warmup_type == "linear") return last / warmup_num_steps;
  return std::log(last + 1.0) / std::log(warmup_num_steps);
}

double warmup_steps(const SchedulerConfig& config) {
  return std::max(2.0, param(config, "warmup_num_steps"));
}

double between(const SchedulerConfig& config, double share) {
  const double low = param(config, "warmup_min_lr");
  return low + (param(config, "warmup_max_lr") - low) * share;
}

double warmup_lr(const SchedulerConfig& config, double, double step) {
  const double last = step - 1;
  if (last < 0) return param(config, "warmup_min_lr");
  const double warmup = warmup_steps(config);
  return between(config, last < warmup ? warmup_share(config, last, warmup) : 1.0);
}

double warmup_decay_lr(const SchedulerConfig& config, double base_rate, double step) {
  const double last = step - 1;
  const double warmup = warmup_steps(config);
  if (last < warmup) return warmup_lr(config, base_rate, step);
  const double total = param(config, "total_num_steps");
  return between(config, std::max(0.0, (total - last) / std::max(1.0, total - warmup)));
}

double warmup_cosine_lr(const SchedulerConfig& config, double base_rate, double step) {
  const double last = step - 1;
  if (last < 0) return 0.0;
  const double warmup = warmup_steps(config);
  if (last < warmup) {
    const double low = param(config, "warmup_min_ratio");
    return base_rate * (low + (1.0 - low) * warmup_share(config, last, warmup));
  }
  const double low = param(config, "cos_min_ratio");
  const double total = std::max(1.0, param(config, "total_num_steps") - warmup);
  const double ratio = 0.5 * (1.0 + std::cos(pi * (last - warmup + 1.0) / total));
  return base_rate * std::max(0.0, low + (1.0 - low) * ratio);
}

double one_cycle(const SchedulerConfig& config, double, double step) {
  const double first = param(config, "cycle_first_step_size");
  const double total = first + param(config, "cycle_second_step_size");
  const double low = param(config, "cycle_min_lr");
  if (step - 1 < total) {
    const double x = 1.0 + step / total - std::floor(1.0 + step / total);
    const double peak = first / total;
    const double share = x <= peak ? x / peak : (x - 1.0) / (peak - 1.0);
    return low + (param(config, "cycle_max_lr") - low) * share;
  }
  const double decay_step_size = param(config, "decay_step_size");
  if (decay_step_size == 0.0) return low;
  return low / (1.0 + param(config, "decay_lr_rate") * (step - total) / decay_step_size);
}

double lr_range_test(const SchedulerConfig& config, double, double step) {
  double interval = step / param(config, "lr_range_test_step_size");
  if (param(config, "lr_range_test_staircase") != 0.0) interval = std::floor(interval);
  return param(config, "lr_range_test_min_lr") *
         (1.0 + param(config, "lr_range_test_step_rate") * interval);
}

struct Entry {
  std::string_view type;
  double (*formula)(const SchedulerConfig&, double, double);
  const char* total_steps;  ///< param without which the formula cannot work, or null
};

constexpr Entry kSchedules[] = {
    {"linear", linear, "num_training_steps"},
    {"cosine", cosine, "num_training_steps"},
    {"cosine_with_restarts", cosine_with_restarts, "num_training_steps"},
    {"polynomial", polynomial, "num_training_steps"},
    {"constant", constant, nullptr},
    {"constant_with_warmup", constant_with_warmup, nullptr},
    {"inverse_sqrt", inverse_sqrt, nullptr},
    {"WarmupLR", warmup_lr, nullptr},
    {"WarmupDecayLR", warmup_decay_lr, "total_num_steps"},
    {"WarmupCosineLR", warmup_cosine_lr, "total_num_steps"},
    {"OneCycle", one_cycle, nullptr},
    {"LRRangeTest", lr_range_test, nullptr},
};

}  // namespace

LrSchedule::LrSchedule(const SchedulerConfig& config, double base_rate)
    : config_(config), base_rate_(base_rate), formula_(nullptr) {
  for (const Entry& entry : kSchedules) {
    if (entry.type != config.type) continue;
    formula_ = entry.formula;
    check<ConfigError>(entry.total_steps == nullptr || config.params.contains(entry.total_steps),
                       "scheduler.params.", entry.total_steps == nullptr ? "" : entry.total_steps,
                       ": missing; schedule \"", config.type,
                       "\" needs the number of training steps (--max_steps or the file)");
  }
  check<ConfigError>(formula_ != nullptr, "scheduler.type = \"", config.type,
                     "\": no such schedule");
}

double LrSchedule::rate(std::int64_t completed_steps) const {
  return formula_(config_, base_rate_, static_cast<double>(completed_steps));
}

}  // namespace bitfall
