// Config: a DeepSpeed JSON file, checked, completed from the command line, with the origin of each
// value.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "core/dtype.h"
#include "eigen_sched/eigenvalue_config.h"
#include "quantizer/quantize_config.h"

namespace bitfall {

struct OptimizerConfig {
  double lr = 5e-5;
  std::array<double, 2> betas{0.9, 0.999};
  double eps = 1e-8;
  double weight_decay = 0.0;
  bool bias_correction = true;
  bool adam_w_mode = true;
};

/// type: a DeepSpeed scheduler (WarmupLR, WarmupDecayLR, WarmupCosineLR, OneCycle, LRRangeTest)
/// with its params, or a Hugging Face lr_scheduler_type (linear, cosine, cosine_with_restarts,
/// polynomial, constant, constant_with_warmup, inverse_sqrt) with num_warmup_steps and
/// num_training_steps.
struct SchedulerConfig {
  std::string type = "linear";
  std::map<std::string, double> params;
  std::string warmup_type = "log";  ///< "log" or "linear", WarmupLR family
};

struct LossScaleConfig {
  bool dynamic = false;
  double initial_scale = 1.0;
  std::int64_t loss_scale_window = 1000;
  int hysteresis = 2;
  bool consecutive_hysteresis = false;
  double min_loss_scale = 1.0;
};

struct Config {
  std::int64_t train_batch_size = 0;
  std::int64_t train_micro_batch_size_per_gpu = 0;
  std::int64_t gradient_accumulation_steps = 1;
  double gradient_clipping = 0.0;  ///< 0: off
  std::int64_t steps_per_print = 10;
  bool wall_clock_breakdown = false;
  std::uint64_t seed = 42;
  DType compute_dtype = DType::f32;
  int zero_stage = 0;  ///< 1: ranks share masters and moments; 2: gradients too
  OptimizerConfig optimizer;
  SchedulerConfig scheduler;
  LossScaleConfig loss_scale;
  bool tensorboard_enabled = false;
  std::string tensorboard_output_path, tensorboard_job_name;
  QuantizeConfig quantize;
  EigenvalueConfig eigenvalue;
};

/// A command-line value that may fill an "auto" or clash with the file.
struct FlagValue {
  std::string flag;    ///< "--learning_rate"
  std::string json;    ///< its value as JSON text
  bool given = false;  ///< typed by the user (clashes are errors) or a default (fills gaps only)
};

/// Key path ("optimizer.params.lr", "train_micro_batch_size_per_gpu", ...) -> flag. Run facts that
/// are no DeepSpeed keys use the same map: "bitfall.world_size", "bitfall.num_training_steps",
/// "bitfall.warmup_steps", "bitfall.lr_scheduler_type".
using FlagValues = std::map<std::string, FlagValue>;

struct CompletedConfig {
  Config config;
  std::string json;  ///< the completed DeepSpeed config, pretty-printed
  std::map<std::string, std::string>
      origins;  ///< key path -> "file", "flag --learning_rate", "default", "computed"
  std::vector<std::string> warnings;  ///< aliases used, keys ignored on purpose
};

/// Parses and completes `text` (JSON with comments and trailing commas; empty text is an empty
/// object).
///
/// `source` names the file in messages. Throws ConfigError for everything that spec A1 refuses.
CompletedConfig parse_config(const std::string& text, const std::string& source,
                             const FlagValues& flags);

}  // namespace bitfall
