// The part of the training config that says how and when weights are quantized.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "core/quant_spec.h"

namespace bitfall {

/// "step": one per optimizer step, as documented. "deepspeed-0.6": 6 * max(layer_num, 1) per step.
enum class ScheduleClock { step, deepspeed_0_6 };

/// Parameters that share a bit range and a first period. `quantize_training` has one group; each
/// entry of `compression_training.weight_quantization.different_groups` is one.
struct QuantizeGroupConfig {
  std::string name;  ///< empty for quantize_training
  int start_bits = 16;
  int target_bits = 16;
  std::int64_t quantize_period = 100;
  std::vector<std::string>
      modules;  ///< regular expressions searched in parameter names; empty: all
  std::vector<std::string> exclude_modules;  ///< regular expressions; empty: none
};

struct QuantizeConfig {
  bool enabled = false;
  std::vector<QuantizeGroupConfig> groups;  ///< at least one when enabled
  std::int64_t schedule_offset =
      100;                           ///< optimizer steps (clock "step") before quantization begins
  std::int64_t quantize_groups = 1;  ///< slices of each tensor with a scale of their own
  QuantType q_type = QuantType::symmetric;
  Rounding rounding = Rounding::nearest;
  ScheduleClock clock = ScheduleClock::step;
  bool mixed_enabled = false;   ///< fp16_mixed_quantize.enabled
  double change_ratio = 0.001;  ///< fp16_mixed_quantize.quantize_change_ratio, subtracted each step
  bool verbose = false;         ///< quantize_verbose
};

}  // namespace bitfall
