#include <array>
#include <cmath>
#include <optional>

#include "core/error.h"
#include "engine/config_parts.h"

namespace bitfall {
namespace {

using nlohmann::json;

constexpr Range kBatch{1, 1 << 20};
constexpr std::int64_t kDefaultMicroBatch = 8;  // Hugging Face's per_device_train_batch_size

struct BatchSizes {
  std::optional<std::int64_t> train, micro, accumulation;
  std::int64_t world = 1;
};

std::int64_t read_world_size(ConfigSection& root) {
  const FlagValue* flag = root.source().flag("bitfall.world_size");
  if (flag == nullptr) return 1;
  const json value = flag_value(*flag);
  check<ConfigError>(value.is_number_integer() && kBatch.contains(value.get<double>()), flag->flag,
                     " = ", flag->json, ": expected a number of ranks ", kBatch.to_string());
  return value.get<std::int64_t>();
}

/// What the default of a flag says; a given flag or an "auto" was filled by `find` before.
std::int64_t flag_default(ConfigSection& root, const std::string& key, std::int64_t otherwise) {
  const FlagValue* flag = root.source().flag(key);
  if (flag == nullptr) {
    root.put(key, otherwise, "default");
    return otherwise;
  }
  const json value = flag_value(*flag);
  root.put(key, value, concat("flag ", flag->flag));
  if (!value.is_number_integer() || !kBatch.contains(value.get<double>())) {
    root.refuse(key, value, "an integer " + kBatch.to_string());
  }
  return value.get<std::int64_t>();
}

/// train_batch_size / (known * world), which must come out even.
std::int64_t divide(ConfigSection& root, const std::string& key, const std::string& known_key,
                    std::int64_t known, const BatchSizes& sizes) {
  const std::int64_t divisor = known * sizes.world;
  if (*sizes.train % divisor != 0 || *sizes.train < divisor) {
    root.refuse("train_batch_size", *sizes.train,
                concat("a multiple of ", known_key, " (", known, ") x world size (", sizes.world,
                       ") = ", divisor));
  }
  const std::int64_t result = *sizes.train / divisor;
  root.put(key, result, "computed");
  return result;
}

/// DeepSpeed fills what is missing of the three sizes; the defaults of flags come after that.
void complete(ConfigSection& root, BatchSizes& sizes) {
  const std::string micro = "train_micro_batch_size_per_gpu";
  const std::string accumulation = "gradient_accumulation_steps";
  if (sizes.train && sizes.micro && !sizes.accumulation) {
    sizes.accumulation = divide(root, accumulation, micro, *sizes.micro, sizes);
  } else if (sizes.train && !sizes.micro) {
    if (!sizes.accumulation) {
      sizes.accumulation = 1;
      root.put(accumulation, 1, "default");
    }
    sizes.micro = divide(root, micro, accumulation, *sizes.accumulation, sizes);
  }
  if (!sizes.micro) sizes.micro = flag_default(root, micro, kDefaultMicroBatch);
  if (!sizes.accumulation) sizes.accumulation = flag_default(root, accumulation, 1);
  const std::int64_t product = *sizes.micro * *sizes.accumulation * sizes.world;
  if (!sizes.train) {
    sizes.train = product;
    root.put("train_batch_size", product, "computed");
  }
  if (*sizes.train != product) {
    root.refuse("train_batch_size", *sizes.train,
                concat(product, " = ", micro, " (", *sizes.micro, ") x ", accumulation, " (",
                       *sizes.accumulation, ") x world size (", sizes.world,
                       "); leave one of them out to have it computed"));
  }
}

std::array<double, 2> read_betas(ConfigSection& params, const std::array<double, 2>& otherwise) {
  const std::optional<json> value = params.find("betas");
  if (!value) {
    params.put("betas", otherwise, "default");
    return otherwise;
  }
  const std::string expected = "two numbers from 0 to below 1, for example [0.9, 0.999]";
  if (!value->is_array() || value->size() != 2) params.refuse("betas", *value, expected);
  const Range range{0, 1, Range::Ends::open_high};
  for (const json& beta : *value) {
    if (!beta.is_number() || !range.contains(beta.get<double>())) {
      params.refuse("betas", *value, expected);
    }
  }
  return {(*value)[0].get<double>(), (*value)[1].get<double>()};
}

/// DeepSpeed: type Adam decouples the decay too unless adam_w_mode is false; AdamW always does.
void read_adam_mode(ConfigSection& params, const std::string& type, OptimizerConfig& optimizer) {
  optimizer.adam_w_mode = params.flag("adam_w_mode", true);
  if (type == "AdamW" && !optimizer.adam_w_mode) {
    params.refuse("adam_w_mode", false,
                  "true for type \"AdamW\"; type \"Adam\" with adam_w_mode false gives plain L2");
  }
}

void read_loss_scale(ConfigSection& fp16, LossScaleConfig& loss_scale) {
  // loss_scale 0 means dynamic; anything else is the scale.
  const double fixed = fp16.number("loss_scale", kNonNegative, 0.0);
  const std::int64_t power = fp16.integer("initial_scale_power", {0, 64}, 16);
  loss_scale.loss_scale_window =
      fp16.integer("loss_scale_window", kCount, loss_scale.loss_scale_window);
  loss_scale.hysteresis = static_cast<int>(fp16.integer("hysteresis", {1, 1 << 20}, 2));
  loss_scale.consecutive_hysteresis = fp16.flag("consecutive_hysteresis", false);
  loss_scale.min_loss_scale =
      fp16.number("min_loss_scale", {0, kMaxReal, Range::Ends::open_low}, 1.0);
  loss_scale.dynamic = fixed == 0.0;
  loss_scale.initial_scale = loss_scale.dynamic ? std::ldexp(1.0, static_cast<int>(power)) : fixed;
  if (loss_scale.dynamic && loss_scale.initial_scale < loss_scale.min_loss_scale) {
    fp16.refuse("min_loss_scale", loss_scale.min_loss_scale,
                concat("at most 2^initial_scale_power = ", loss_scale.initial_scale));
  }
}

}  // namespace

void read_batch_sizes(ConfigSection& root, Config& config) {
  BatchSizes sizes;
  sizes.world = read_world_size(root);
  // An "auto" total is computed from its parts, as Hugging Face does.
  const json* total = root.take("train_batch_size");
  if (total == nullptr || *total != "auto") {
    sizes.train = root.find_integer("train_batch_size", kCount);
  }
  sizes.micro = root.find_integer("train_micro_batch_size_per_gpu", kBatch);
  sizes.accumulation = root.find_integer("gradient_accumulation_steps", kBatch);
  complete(root, sizes);
  config.train_batch_size = *sizes.train;
  config.train_micro_batch_size_per_gpu = *sizes.micro;
  config.gradient_accumulation_steps = *sizes.accumulation;
}

void read_precision(ConfigSection& root, Config& config) {
  // --fp16 and --bf16 act whether or not the file has the section.
  ConfigSection fp16 = root.section("fp16");
  const bool fp16_enabled = fp16.flag("enabled", false);
  LossScaleConfig loss_scale;  // read and checked whether or not the section is enabled
  read_loss_scale(fp16, loss_scale);
  if (fp16_enabled) config.loss_scale = loss_scale;
  fp16.ignore({"auto_cast"});
  fp16.only_off({"fp16_master_weights_and_grads"});
  fp16.finish();

  if (root.has("bfloat16") && !root.has("bf16")) {
    root.source().warn("bfloat16", "read as \"bf16\"");
  }
  ConfigSection bf16 =
      root.section(root.has("bfloat16") && !root.has("bf16") ? "bfloat16" : "bf16");
  const bool bf16_enabled = bf16.flag("enabled", false);
  bf16.ignore({"immediate_grad_update", "check_grad_overflow"});
  bf16.only_off({"bf16_master_weights_and_grads", "bf16_optimizer_states"});
  bf16.finish();

  if (fp16_enabled && bf16_enabled) {
    bf16.refuse("enabled", true, "false, because fp16.enabled is true; choose one of the two");
  }
  config.compute_dtype = fp16_enabled ? DType::f16 : bf16_enabled ? DType::bf16 : DType::f32;
}

void read_optimizer(ConfigSection& root, Config& config) {
  OptimizerConfig& optimizer = config.optimizer;
  const bool in_file = root.has("optimizer");
  // Without the section Hugging Face builds AdamW from its flags; with it, only "auto" and given
  // flags come from there.
  ConfigSection section =
      root.section("optimizer", in_file ? FillAbsent::given_flags : FillAbsent::all_flags);
  std::string type = section.text("type", "AdamW");
  const std::string as_written = type;
  if (type == "adam") type = "Adam";
  if (type == "adamw" || type == "adamW") type = "AdamW";
  if (type != "Adam" && type != "AdamW") {
    section.refuse("type", as_written, "\"Adam\" or \"AdamW\", the optimizers of bitfall");
  }
  ConfigSection params = section.section("params");
  if (params.has("max_grad_norm")) {
    throw ConfigError(concat(root.source().where(params.path("max_grad_norm")),
                             ": set the top-level key gradient_clipping instead"));
  }
  // DeepSpeed's own default of the rate is 1e-3, Hugging Face's 5e-5.
  optimizer.lr = params.number("lr", kNonNegative, in_file ? 1e-3 : optimizer.lr);
  optimizer.betas = read_betas(params, optimizer.betas);
  optimizer.eps = params.number("eps", kNonNegative, optimizer.eps);
  optimizer.weight_decay = params.number("weight_decay", kNonNegative, optimizer.weight_decay);
  optimizer.bias_correction = params.flag("bias_correction", optimizer.bias_correction);
  read_adam_mode(params, type, optimizer);
  params.ignore({"torch_adam", "fused", "foreach"});
  params.only_off({"amsgrad", "maximize"});
  params.finish();
  section.ignore({"legacy_fusion"});
  section.finish();
}

}  // namespace bitfall
