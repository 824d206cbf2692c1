// Any text is either a config or a ConfigError: no crash, no undefined behaviour, no other
// exception.
#include <cstddef>
#include <cstdint>
#include <string>

#include "core/error.h"
#include "engine/config.h"

namespace {

/// What `bitfall glue` passes: values for "auto", some of them typed by the user.
const bitfall::FlagValues& flags() {
  static const bitfall::FlagValues values = {
      {"train_micro_batch_size_per_gpu", {"--per_device_train_batch_size", "32", true}},
      {"gradient_accumulation_steps", {"--gradient_accumulation_steps", "1", false}},
      {"gradient_clipping", {"--max_grad_norm", "1.0", false}},
      {"seed", {"--seed", "42", false}},
      {"fp16.enabled", {"--fp16", "false", false}},
      {"bf16.enabled", {"--bf16", "true", true}},
      {"optimizer.params.lr", {"--learning_rate", "2e-05", true}},
      {"optimizer.params.betas", {"--adam_beta1", "[0.9, 0.999]", false}},
      {"bitfall.lr_scheduler_type", {"--lr_scheduler_type", "\"linear\"", false}},
      {"bitfall.world_size", {"--world_size", "1", true}},
      {"bitfall.num_training_steps", {"--max_steps", "345", false}},
      {"bitfall.warmup_steps", {"--warmup_steps", "2", false}},
  };
  return values;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const std::string text(reinterpret_cast<const char*>(data), size);
  bitfall::CompletedConfig completed;
  try {
    completed = bitfall::parse_config(text, "fuzz.json", flags());
  } catch (const bitfall::ConfigError&) {
    return 0;
  }
  // What was accepted and completed means the same again: anything thrown here is a finding.
  if (bitfall::parse_config(completed.json, "completed.json", {}).json != completed.json) {
    __builtin_trap();
  }
  return 0;
}
