// Quantizer: which parameters are quantized, which state of the schedule each belongs to, and the
// working weights that follow from both. Spec A3, A4.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "core/model.h"
#include "eigen_sched/bit_schedule.h"
#include "quantizer/quantize_config.h"

namespace bitfall {

/// The states that `config` needs for `parameters`: per quantize group one for each block with a
/// selected parameter, "LAYER_NAME.INDEX", then "other" for those outside of the blocks. With
/// several groups a name begins with "GROUP/".
///
/// A parameter is selected if it has two or more dimensions, a pattern of `modules` (if there are
/// any) and none of `exclude_modules` is found in its name or in the name of its module (the name
/// without ".weight").
///
/// Throws ConfigError for a pattern that is no regular expression or matches nothing, a group that
/// selects nothing, or a parameter in two groups.
std::vector<BitStateSpec> bit_states(const QuantizeConfig& config,
                                     const std::vector<Parameter>& parameters,
                                     const std::string& layer_name);

/// Per parameter, how many neighbouring elements share a scale, and so must lie on one rank; 1
/// where it is never quantized. Throws as bit_states().
std::vector<std::int64_t> elements_per_scale(const QuantizeConfig& config,
                                             const std::vector<Parameter>& parameters);

class Quantizer final : public WeightTransform {
 public:
  /// `schedule` was built from bit_states() of the same config and parameters, and outlives the
  /// quantizer. `seed` keys stochastic rounding.
  ///
  /// Throws ConfigError like bit_states(), and where quantize_groups does not divide a selected
  /// parameter or where working weights share the memory of the masters.
  Quantizer(const QuantizeConfig& config, const ParameterStore& store, const BitSchedule& schedule,
            std::uint64_t seed);

  /// working = mix * master + (1 - mix) * quantize(master) at each state's bits; a plain cast of
  /// parameters that are not selected, and of all until quantization begins. Of the store's slice
  /// only, whose borders lie between scales.
  void publish(Backend& backend, ParameterStore& store, std::int64_t step) override;

  /// The quantized weights of `step` in f32, exactly on their grid (no mix), into any flat f32
  /// buffer of the store's layout; parameters that are not quantized are copied from the master. Of
  /// the store's slice only.
  void quantize_into(Backend& backend, const ParameterStore& store, std::int64_t step,
                     const Tensor& flat_f32) const;

  /// False for parameters that are never quantized.
  bool selects(std::size_t parameter) const { return states_[parameter].has_value(); }
  /// How `parameter` is quantized now; 16 bits where it is only cast.
  QuantSpec spec(std::size_t parameter) const;
  /// Key of the random numbers with which `parameter` is rounded at `step`.
  StochasticKey key(std::size_t parameter, std::int64_t step) const;
  /// How each of store.owned_parts() is published at `step`.
  std::vector<FakeQuantizeRange> ranges(const ParameterStore& store, std::int64_t step) const;

 private:
  QuantizeConfig config_;
  const BitSchedule& schedule_;
  std::uint64_t seed_;
  std::vector<std::optional<std::size_t>> states_;  ///< per parameter: its state in the schedule
};

}  // namespace bitfall
