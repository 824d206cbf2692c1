// The sections of a ds_config, one reader each. Private to engine/config*.cpp.
#pragma once

#include "engine/config_section.h"

namespace bitfall {

/// config_training.cpp: DeepSpeed's train_batch_size = micro * gradient_accumulation_steps * world.
void read_batch_sizes(ConfigSection& root, Config& config);
/// config_training.cpp: fp16 and bf16, the compute dtype and the loss scale.
void read_precision(ConfigSection& root, Config& config);
/// config_training.cpp
void read_optimizer(ConfigSection& root, Config& config);
/// config_scheduler.cpp
void read_scheduler(ConfigSection& root, Config& config);
/// config_zero.cpp
void read_zero(ConfigSection& root, Config& config);
/// config_quantize.cpp: quantize_training, compression_training and eigenvalue.
void read_quantization(ConfigSection& root, Config& config);

}  // namespace bitfall
