// Optimizer: Adam and AdamW over the flat buffers of a ParameterStore.
#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <string_view>
#include <vector>

#include "core/backend.h"
#include "core/parameter_store.h"
#include "engine/config.h"

namespace bitfall {

/// False for biases and layer norms, as Hugging Face's Trainer groups parameters: names with "bias"
/// or "layernorm" in them, whatever the case.
bool decays(std::string_view parameter_name);

/// What Adam does with some of the parameters; torch calls it a param_group.
struct ParameterGroup {
  std::vector<std::size_t> parameters;  ///< rising indices into the store
  double learning_rate = 0;
  double weight_decay = 0;
  std::array<double, 2> betas{0.9, 0.999};
  double eps = 1e-8;
};

/// Two groups with the numbers of `config`: what decays, and what does not.
std::vector<ParameterGroup> default_groups(const ParameterStore& store,
                                           const OptimizerConfig& config);

class Optimizer {
 public:
  /// Allocates the moments, [owned().numel] f32 each, zero. Of `config` only what holds for all
  /// groups is read. Throws ConfigError unless every parameter is in exactly one group.
  Optimizer(Backend& backend, const ParameterStore& store, const OptimizerConfig& config,
            std::vector<ParameterGroup> groups);

  /// Their numbers may change from step to step, their parameters may not.
  const std::vector<ParameterGroup>& groups() const { return groups_; }
  void set_learning_rate(double learning_rate);  ///< of all groups
  /// `groups` has one entry per group, of which the parameters are ignored. Throws ConfigError for
  /// another number of groups and for numbers that Adam cannot work with.
  void set_numbers(const std::vector<ParameterGroup>& groups);

  /// Updates store.master() from store.gradient() as `decision` of Backend::decide_update says, in
  /// this rank's slice. Then publishes them to store.working(): `published` says how, for each of
  /// store.owned_parts(), or is empty where the masters are the working weights. Counts the step
  /// whatever was decided.
  void step(const ParameterStore& store, const Tensor& decision,
            std::span<const FakeQuantizeRange> published);

  /// Updates so far; sets the bias correction. Who skips one sets it back.
  std::int64_t steps() const { return steps_; }
  void set_steps(std::int64_t steps) { steps_ = steps; }
  Tensor exp_avg() const { return exp_avg_; }        ///< [owned().numel] f32
  Tensor exp_avg_sq() const { return exp_avg_sq_; }  ///< [owned().numel] f32

 private:
  AdamStep adam_step(const ParameterGroup& group) const;

  Backend& backend_;
  OptimizerConfig config_;
  std::vector<ParameterGroup> groups_;
  std::vector<std::size_t> group_of_;  ///< per parameter
  Buffer exp_avg_buffer_, exp_avg_sq_buffer_;
  Tensor exp_avg_, exp_avg_sq_;
  std::int64_t steps_ = 0;
};

}  // namespace bitfall
