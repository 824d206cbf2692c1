// BitSchedule: when each state loses a bit. Spec A2, A3.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "quantizer/quantize_config.h"

namespace bitfall {

/// What a state is for: the parameters of one block (or, with kNoBlock, all others) of one quantize
/// group.
struct BitStateSpec {
  std::string name;  ///< "bert.encoder.layer.3", "other"; "group/..." if there are several groups
  int block = -1;    ///< kNoBlock for "other"
  int group = 0;     ///< index into QuantizeConfig::groups
};

/// Everything that a checkpoint keeps of one state.
struct BitState {
  int bits = 16;
  double period = 0;  ///< next threshold, in clock ticks since quantization began
  int factor = 1;     ///< f = 1 + floor(4 ev), with the last known eigenvalue
  double mix = 1.0;   ///< share of unquantized weight when mixed quantization is on
};

struct BitScheduleState {
  std::int64_t ticks = 0;
  bool started = false;
  std::vector<BitState> states;
};

/// One bit less, decided before the weights of `step` are quantized.
struct BitDrop {
  std::int64_t step = 0;
  std::size_t state = 0;
  int old_bits = 0, new_bits = 0;
  double next_threshold = 0;  ///< ticks; 0 when the target is reached
  int factor = 1;
};

class BitSchedule {
 public:
  /// `layer_num` is the number of blocks that have eigenvalues, 0 when they are off: it sets the
  /// tick of clock "deepspeed-0.6".
  BitSchedule(const QuantizeConfig& config, std::vector<BitStateSpec> specs, int layer_num);

  const std::vector<BitStateSpec>& specs() const { return specs_; }
  /// False until the offset has passed: weights are then only cast.
  bool quantizing() const { return state_.started; }
  int bits(std::size_t state) const { return state_.states[state].bits; }
  double mix(std::size_t state) const { return state_.states[state].mix; }
  int factor(std::size_t state) const { return state_.states[state].factor; }

  /// True if some state of a block would drop a bit in the next advance, so that eigenvalues are
  /// needed now.
  bool block_would_drop() const;
  /// One optimizer step that was not skipped. `eigenvalues` (one per block, each in [0, 1]) or
  /// empty.
  std::vector<BitDrop> advance(std::int64_t step, std::span<const double> eigenvalues);

  const BitScheduleState& state() const { return state_; }
  /// Throws CheckpointError if the number of states or a value does not fit.
  void restore(const BitScheduleState& state);

 private:
  struct Clock {
    std::int64_t ticks = 0;
    bool started = false;
  };

  /// The clock of the next step that is not skipped.
  Clock next_clock() const;
  bool drops_at(const Clock& clock, std::size_t state) const;

  QuantizeConfig config_;
  std::vector<BitStateSpec> specs_;
  std::int64_t ticks_per_step_ = 1;
  BitScheduleState state_;
};

/// One line of the table that is shown before training.
struct PlannedState {
  std::string name;
  int factor = 1;
  std::vector<std::pair<int, std::int64_t>>
      drops;  ///< {bits, first step at that width}, start_bits first; unlimited steps
};

/// Steps at which each width begins under constant eigenvalues (closed form: periods may reach 1e9
/// steps).
std::vector<PlannedState> plan_bits(const QuantizeConfig& config,
                                    const std::vector<BitStateSpec>& specs, int layer_num,
                                    std::span<const double> eigenvalues);

/// Largest quantize_period with which `group` reaches its target within `steps` at `factor`; 0 if
/// none does.
std::int64_t longest_period_that_reaches(const QuantizeConfig& config, std::size_t group,
                                         int layer_num, int factor, std::int64_t steps);

}  // namespace bitfall
