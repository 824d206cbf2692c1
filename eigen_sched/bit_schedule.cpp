#include "eigen_sched/bit_schedule.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "core/error.h"
#include "eigen_sched/eigenvalue_estimator.h"

namespace bitfall {
namespace {

// A step beyond any training: what lies later is reported as this.
constexpr std::int64_t kNever = std::numeric_limits<std::int64_t>::max();

std::int64_t ticks_per_step(ScheduleClock clock, int layer_num) {
  return clock == ScheduleClock::step ? 1 : 6 * std::int64_t{std::max(layer_num, 1)};
}

const QuantizeGroupConfig& group_of(const QuantizeConfig& config, const BitStateSpec& spec) {
  check<ConfigError>(spec.group >= 0 && spec.group < static_cast<int>(config.groups.size()),
                     "bit state '", spec.name, "' belongs to quantize group ", spec.group, " of ",
                     config.groups.size());
  return config.groups[static_cast<std::size_t>(spec.group)];
}

void check_config(const QuantizeConfig& config) {
  check<ConfigError>(config.schedule_offset >= 0, "schedule_offset = ", config.schedule_offset,
                     ": expected 0 or more");
  for (const QuantizeGroupConfig& group : config.groups) {
    check<ConfigError>(group.target_bits >= 1 && group.start_bits >= group.target_bits,
                       "start_bits = ", group.start_bits, ", target_bits = ", group.target_bits,
                       ": expected start_bits >= target_bits >= 1");
    check<ConfigError>(group.quantize_period >= 1, "quantize_period = ", group.quantize_period,
                       ": expected at least 1");
  }
}

int factor_for(const BitStateSpec& spec, std::span<const double> eigenvalues) {
  const auto block = static_cast<std::size_t>(spec.block);
  check<ShapeError>(block < eigenvalues.size(), "bit state '", spec.name, "' needs eigenvalue ",
                    spec.block, ", got ", eigenvalues.size(), " eigenvalues");
  const double value = eigenvalues[block];
  check<ShapeError>(value >= 0 && value <= 1, "eigenvalue of '", spec.name, "' = ", value,
                    ": expected a normalized value in [0, 1]");
  return eigenvalue_factor(value);
}

/// When quantization begins, in steps: `first` is the first quantized step, ticks count from
/// `origin`.
struct Beginning {
  std::int64_t first, origin;
};

Beginning beginning(const QuantizeConfig& config, std::int64_t tick) {
  const std::int64_t offset = config.schedule_offset;
  if (config.clock == ScheduleClock::step) return {offset == kNever ? kNever : offset + 1, offset};
  const std::int64_t origin = offset / tick + (offset % tick != 0 ? 1 : 0);
  return {std::max<std::int64_t>(origin, 1), origin};
}

/// First step at which `threshold` ticks have passed.
std::int64_t step_reaching(double threshold, const Beginning& begin, std::int64_t tick) {
  if (threshold >= 0x1p62 || begin.origin >= kNever / 2) return kNever;
  const auto ticks = static_cast<std::int64_t>(threshold);
  return begin.origin + ticks / tick + (ticks % tick != 0 ? 1 : 0);
}

/// {bits, first step}: closed form of advance() under a constant factor.
std::vector<std::pair<int, std::int64_t>> plan_drops(const QuantizeConfig& config,
                                                     const QuantizeGroupConfig& group,
                                                     std::int64_t period, std::int64_t tick,
                                                     int factor) {
  const Beginning begin = beginning(config, tick);
  std::vector<std::pair<int, std::int64_t>> drops{{group.start_bits, begin.first}};
  auto threshold = static_cast<double>(period);
  // The step that restarts the clock of "deepspeed-0.6" cannot drop; later each step drops once.
  std::int64_t earliest = begin.origin == kNever ? kNever : begin.origin + 1;
  for (int bits = group.start_bits - 1; bits >= group.target_bits; --bits) {
    const std::int64_t step = std::max(step_reaching(threshold, begin, tick), earliest);
    drops.emplace_back(bits, step);
    earliest = step == kNever ? kNever : step + 1;
    threshold *= 2.0 * factor;
  }
  return drops;
}

}  // namespace

BitSchedule::BitSchedule(const QuantizeConfig& config, std::vector<BitStateSpec> specs,
                         int layer_num)
    : config_(config),
      specs_(std::move(specs)),
      ticks_per_step_(ticks_per_step(config.clock, layer_num)) {
  check_config(config_);
  for (const BitStateSpec& spec : specs_) {
    const QuantizeGroupConfig& group = group_of(config_, spec);
    state_.states.push_back({.bits = group.start_bits,
                             .period = static_cast<double>(group.quantize_period),
                             .factor = 1,
                             .mix = config_.mixed_enabled ? 1.0 : 0.0});
  }
}

BitSchedule::Clock BitSchedule::next_clock() const {
  const std::int64_t ticks = state_.ticks + ticks_per_step_;
  if (state_.started) return {ticks, true};
  const std::int64_t offset = config_.schedule_offset;
  if (config_.clock == ScheduleClock::step) {
    if (state_.ticks < offset) return {ticks, false};
    return {ticks_per_step_, true};
  }
  // DeepSpeed counts on from zero at the step that reaches the offset, and quantizes that step.
  if (offset == 0) return {ticks, true};
  return ticks >= offset ? Clock{0, true} : Clock{ticks, false};
}

bool BitSchedule::drops_at(const Clock& clock, std::size_t index) const {
  const BitState& state = state_.states[index];
  return clock.started && state.bits > group_of(config_, specs_[index]).target_bits &&
         static_cast<double>(clock.ticks) >= state.period;
}

bool BitSchedule::block_would_drop() const {
  const Clock clock = next_clock();
  for (std::size_t index = 0; index < specs_.size(); ++index) {
    if (specs_[index].block >= 0 && drops_at(clock, index)) return true;
  }
  return false;
}

std::vector<BitDrop> BitSchedule::advance(std::int64_t step, std::span<const double> eigenvalues) {
  std::vector<int> factors;
  for (std::size_t index = 0; index < specs_.size(); ++index) {
    const bool known = specs_[index].block >= 0 && !eigenvalues.empty();
    factors.push_back(known ? factor_for(specs_[index], eigenvalues) : state_.states[index].factor);
  }

  const Clock clock = next_clock();
  state_.ticks = clock.ticks;
  state_.started = clock.started;
  std::vector<BitDrop> drops;
  for (std::size_t index = 0; index < specs_.size(); ++index) {
    BitState& state = state_.states[index];
    state.factor = factors[index];
    state.mix = std::max(0.0, state.mix - config_.change_ratio);
    if (!drops_at(clock, index)) continue;
    state.bits -= 1;
    state.period *= 2.0 * state.factor;
    state.mix = config_.mixed_enabled ? 1.0 : 0.0;
    const bool done = state.bits == group_of(config_, specs_[index]).target_bits;
    drops.push_back(
        {step, index, state.bits + 1, state.bits, done ? 0 : state.period, state.factor});
  }
  return drops;
}

void BitSchedule::restore(const BitScheduleState& state) {
  check<CheckpointError>(state.states.size() == specs_.size(), "the checkpoint has ",
                         state.states.size(), " bit states, this run has ", specs_.size(),
                         ": resume with the config and model of the checkpoint");
  check<CheckpointError>(state.ticks >= 0, "bit schedule: ticks = ", state.ticks,
                         ": expected 0 or more");
  for (std::size_t index = 0; index < specs_.size(); ++index) {
    const BitState& saved = state.states[index];
    const QuantizeGroupConfig& group = group_of(config_, specs_[index]);
    const std::string& name = specs_[index].name;
    check<CheckpointError>(saved.bits >= group.target_bits && saved.bits <= group.start_bits,
                           "bit state '", name, "': bits = ", saved.bits, ", expected ",
                           group.target_bits, "..", group.start_bits);
    check<CheckpointError>(std::isfinite(saved.period) && saved.period >= 1, "bit state '", name,
                           "': period = ", saved.period, ", expected at least 1");
    check<CheckpointError>(saved.factor >= 1 && saved.factor <= 5, "bit state '", name,
                           "': factor = ", saved.factor, ", expected 1..5");
    check<CheckpointError>(saved.mix >= 0 && saved.mix <= 1, "bit state '", name,
                           "': mix = ", saved.mix, ", expected 0..1");
  }
  state_ = state;
}

std::vector<PlannedState> plan_bits(const QuantizeConfig& config,
                                    const std::vector<BitStateSpec>& specs, int layer_num,
                                    std::span<const double> eigenvalues) {
  check_config(config);
  const std::int64_t tick = ticks_per_step(config.clock, layer_num);
  std::vector<PlannedState> plan;
  for (const BitStateSpec& spec : specs) {
    const QuantizeGroupConfig& group = group_of(config, spec);
    const bool known = spec.block >= 0 && !eigenvalues.empty();
    const int factor = known ? factor_for(spec, eigenvalues) : 1;
    plan.push_back(
        {spec.name, factor, plan_drops(config, group, group.quantize_period, tick, factor)});
  }
  return plan;
}

std::int64_t longest_period_that_reaches(const QuantizeConfig& config, std::size_t group,
                                         int layer_num, int factor, std::int64_t steps) {
  check_config(config);
  check<ConfigError>(group < config.groups.size(), "quantize group ", group, " of ",
                     config.groups.size());
  const QuantizeGroupConfig& bits = config.groups[group];
  const std::int64_t tick = ticks_per_step(config.clock, layer_num);
  const auto reaches = [&](std::int64_t period) {
    return plan_drops(config, bits, period, tick, factor).back().second <= steps;
  };
  // Reaching is monotone in the period: bisect between a period that does and one that does not.
  std::int64_t shortest = 0, longest = kNever;
  if (reaches(longest)) return longest;
  while (longest - shortest > 1) {
    const std::int64_t middle = shortest + (longest - shortest) / 2;
    (reaches(middle) ? shortest : longest) = middle;
  }
  return shortest;
}

}  // namespace bitfall
