// Optimizer: Adam and AdamW over the flat buffers of a ParameterStore.
#pragma once

#include <cstdint>
#include <string_view>
#include <vector>

#include "core/backend.h"
#include "core/parameter_store.h"
#include "engine/config.h"

namespace bitfall {

/// False for biases and layer norms, as Hugging Face's Trainer groups parameters: names with "bias"
/// or "layernorm" in them, whatever the case.
bool decays(std::string_view parameter_name);

class Optimizer {
 public:
  /// Allocates the moments, [numel] f32 each, zero.
  Optimizer(Backend& backend, const ParameterStore& store, const OptimizerConfig& config);

  /// Updates store.master() from store.gradient() * gradient_multiplier.
  void step(const ParameterStore& store, double learning_rate, double gradient_multiplier);

  /// Updates so far; sets the bias correction. Skipped steps do not count.
  std::int64_t steps() const { return steps_; }
  void set_steps(std::int64_t steps) { steps_ = steps; }
  Tensor exp_avg() const { return exp_avg_; }        ///< [numel] f32
  Tensor exp_avg_sq() const { return exp_avg_sq_; }  ///< [numel] f32

 private:
  Backend& backend_;
  OptimizerConfig config_;
  std::vector<DecayRange> ranges_;
  Buffer exp_avg_buffer_, exp_avg_sq_buffer_;
  Tensor exp_avg_, exp_avg_sq_;
  std::int64_t steps_ = 0;
};

}  // namespace bitfall
