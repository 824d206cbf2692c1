// The section zero_optimization: how ranks share optimizer state and gradients.
#include "core/error.h"
#include "engine/config_parts.h"

namespace bitfall {
namespace {

using nlohmann::json;

/// Keys of DeepSpeed that tune its communication or belong to stage 3: nothing here depends on
/// them.
const std::vector<std::string> kWithoutEffect = {
    "allgather_bucket_size",
    "allgather_partitions",
    "contiguous_gradients",
    "cpu_offload_use_pin_memory",
    "elastic_checkpoint",
    "enable_sanity_checks",
    "gather_16bit_weights_on_model_save",
    "ignore_unused_parameters",
    "load_from_fp32_weights",
    "log_trace_cache_warnings",
    "memory_efficient_linear",
    "mics_hierarchical_params_gather",
    "mics_shard_size",
    "model_persistence_threshold",
    "module_granularity_threshold",
    "overlap_comm",
    "override_module_apply",
    "pipeline_loading_checkpoint",
    "reduce_bucket_size",
    "reduce_scatter",
    "round_robin_gradients",
    "stage3_gather_16bit_weights_on_model_save",
    "stage3_gather_fp16_weights_on_model_save",
    "stage3_max_live_parameters",
    "stage3_max_reuse_distance",
    "stage3_model_persistence_threshold",
    "stage3_module_granularity_threshold",
    "stage3_param_persistence_threshold",
    "stage3_prefetch_bucket_size",
    "stage3_use_all_reduce_for_fetch_params",
    "sub_group_size",
    "use_all_reduce_for_fetch_params",
    "use_multi_rank_bucket_allreduce",
    "zero_hpz_partition_size",
};

/// What would change where weights, gradients or moments lie, or their precision.
const std::vector<std::string> kOnlyOff = {
    "cpu_offload",
    "cpu_offload_param",
    "cpu_offload_params",
    "legacy_stage1",
    "zero_quantized_gradients",
    "zero_quantized_nontrainable_weights",
    "zero_quantized_weights",
    "zeropp_loco_param",
};

void refuse_offload(ConfigSection& zero, const std::string& key) {
  const json* value = zero.take(key);
  if (value == nullptr) return;
  const bool off =
      value->is_null() || (value->is_object() && value->contains("device") &&
                           (value->at("device") == "none" || value->at("device").is_null()));
  if (!off) {
    zero.refuse(key, *value,
                "{\"device\": \"none\"}: offloading is not supported, remove this key; stages 1 "
                "and 2 divide the optimizer state among more ranks");
  }
  zero.put(key, *value, "file");
}

}  // namespace

void read_zero(ConfigSection& root, Config& config) {
  const json* whole = root.take("zero_optimization");
  if (whole != nullptr && whole->is_boolean()) {  // the oldest spelling: true is stage 1
    config.zero_stage = whole->get<bool>() ? 1 : 0;
    root.put("zero_optimization", json{{"stage", config.zero_stage}}, "file");
    return;
  }
  ConfigSection zero = root.section("zero_optimization");
  const std::int64_t stage = zero.integer("stage", {0, 3}, 0);
  if (stage == 3) {
    zero.refuse("stage", stage,
                "0, 1 or 2: stage 3 (partitioned weights) is not supported; stage 2 needs the "
                "least memory");
  }
  config.zero_stage = static_cast<int>(stage);
  refuse_offload(zero, "offload_optimizer");
  refuse_offload(zero, "offload_param");
  zero.ignore(kWithoutEffect);
  zero.only_off(kOnlyOff);
  zero.finish();
}

}  // namespace bitfall
