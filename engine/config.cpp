#include "engine/config.h"

#include "core/error.h"
#include "engine/config_parts.h"

namespace bitfall {
namespace {

using nlohmann::json;

/// DeepSpeed keys that change neither what is computed nor what is written.
const std::vector<std::string> kIgnored = {
    "activation_checkpointing",
    "aio",
    "checkpoint",
    "comms_logger",
    "communication_data_type",
    "compile",
    "csv_monitor",
    "data_types",
    "disable_allgather",
    "dump_state",
    "flops_profiler",
    "fp32_allreduce",
    "graph_harvesting",
    "memory_breakdown",
    "pipeline",
    "seq_parallel_communication_data_type",
    "wandb",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
};

/// DeepSpeed keys that bitfall accepts only where they are switched off.
const std::vector<std::string> kOnlyOff = {
    "amp",
    "autotuning",
    "comet",
    "curriculum_learning",
    "data_efficiency",
    "dataloader_drop_last",
    "elasticity",
    "gradient_predivide_factor",
    "hybrid_engine",
    "load_universal_checkpoint",
    "prescale_gradients",
    "progressive_layer_drop",
    "sparse_attention",
    "sparse_gradients",
    "torch_autocast",
};

void read_monitoring(ConfigSection& root, Config& config) {
  config.steps_per_print = root.integer("steps_per_print", kCount, config.steps_per_print);
  config.wall_clock_breakdown = root.flag("wall_clock_breakdown", config.wall_clock_breakdown);
  ConfigSection tensorboard = root.section("tensorboard");
  config.tensorboard_enabled = tensorboard.flag("enabled", false);
  config.tensorboard_output_path = tensorboard.text("output_path", "");
  config.tensorboard_job_name = tensorboard.text("job_name", "DeepSpeedJobName");
  tensorboard.finish();
}

/// What DeepSpeed does not have: read from the completed JSON by those it concerns.
void read_own(ConfigSection& root) {
  ConfigSection own = root.section("bitfall");
  own.flag("native_encoder", true);  // of a torch module that holds a BERT
  own.finish();
}

void read_seed(ConfigSection& root, Config& config) {
  const auto otherwise = static_cast<std::int64_t>(config.seed);
  const FlagValue* flag = root.source().flag("seed");
  if (!root.has("seed") && flag != nullptr) {  // no DeepSpeed default stands against the flag's
    root.put("seed", flag_value(*flag), concat("flag ", flag->flag));
    const json value = flag_value(*flag);
    if (!value.is_number_unsigned() || value.get<double>() > kMaxCount) {
      root.refuse("seed", value, "an integer at least 0");
    }
    config.seed = value.get<std::uint64_t>();
    return;
  }
  config.seed = static_cast<std::uint64_t>(root.integer("seed", kNonNegativeCount, otherwise));
}

}  // namespace

CompletedConfig parse_config(const std::string& text, const std::string& source,
                             const FlagValues& flags) {
  const bool no_file = text.find_first_not_of(" \t\r\n") == std::string::npos;
  JsonText document = no_file ? JsonText{json::object(), {}} : parse_json_text(text, source);
  ConfigSource shared{source, std::move(document.lines), flags, {}, {}};
  json completed;
  // Without a ds_config there is nothing that DeepSpeed would default: flags decide everything.
  ConfigSection root(shared, "", &document.value, completed,
                     no_file ? FillAbsent::all_flags : FillAbsent::given_flags);

  CompletedConfig result;
  Config& config = result.config;
  read_batch_sizes(root, config);
  read_precision(root, config);
  read_optimizer(root, config);
  read_scheduler(root, config);
  config.gradient_clipping = root.number("gradient_clipping", kNonNegative, 0.0);
  read_seed(root, config);
  read_monitoring(root, config);
  read_own(root);
  read_zero(root, config);
  read_quantization(root, config);
  root.ignore(kIgnored);
  root.only_off(kOnlyOff);
  root.finish();

  result.json = completed.dump(2, ' ', false, json::error_handler_t::replace);
  result.origins = std::move(shared.origins);
  result.warnings = std::move(shared.warnings);
  return result;
}

}  // namespace bitfall
