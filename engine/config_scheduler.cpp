#include <algorithm>
#include <optional>

#include "core/error.h"
#include "engine/config_parts.h"

namespace bitfall {
namespace {

using nlohmann::json;

const std::vector<std::string> kHuggingFaceTypes = {
    "linear",   "cosine",       "cosine_with_restarts", "polynomial",
    "constant", "inverse_sqrt", "constant_with_warmup"};
const std::vector<std::string> kDeepSpeedTypes = {"WarmupLR", "WarmupDecayLR", "WarmupCosineLR",
                                                  "OneCycle", "LRRangeTest"};

bool is_one_of(const std::vector<std::string>& names, const std::string& name) {
  return std::find(names.begin(), names.end(), name) != names.end();
}

class SchedulerReader {
 public:
  SchedulerReader(ConfigSection& params, SchedulerConfig& scheduler)
      : params_(params), scheduler_(scheduler) {}

  void number(const std::string& key, double otherwise, const Range& range = kNonNegative) {
    scheduler_.params[key] = params_.number(key, range, otherwise);
  }
  void integer(const std::string& key, std::int64_t otherwise) {
    scheduler_.params[key] =
        static_cast<double>(params_.integer(key, kNonNegativeCount, otherwise));
  }
  void required(const std::string& key) {
    const std::optional<double> value = params_.find_number(key, kNonNegative);
    if (!value) {
      throw ConfigError(concat(params_.source().where(params_.path(key)), ": missing; scheduler \"",
                               scheduler_.type, "\" needs it"));
    }
    scheduler_.params[key] = *value;
  }
  /// Left out while the length of the training is not known; LrSchedule asks for it.
  void training_steps(const std::string& key) {
    const json* in_file = params_.take(key);
    const FlagValue* flag = params_.source().flag(params_.path(key));
    const bool absent = in_file == nullptr || *in_file == "auto";
    if (absent && flag == nullptr) {
      if (in_file != nullptr) params_.put(key, "auto", "file");
      return;
    }
    if (absent) {
      params_.put(key, flag_value(*flag), concat("flag ", flag->flag));
    }
    const json value = absent ? flag_value(*flag) : params_.find(key).value();
    if (!value.is_number() || !kCount.contains(value.get<double>())) {
      params_.refuse(key, value, "an integer at least 1");
    }
    scheduler_.params[key] = value.get<double>();
  }
  /// Absent: the default of --warmup_steps where Hugging Face fills it.
  void warmup_steps(const std::string& key, std::int64_t otherwise) { integer(key, otherwise); }
  void warmup_type() {
    scheduler_.warmup_type = params_.choice("warmup_type", {"log", "linear"}, "log");
  }
  void warmup_rates() {
    number("warmup_min_lr", 0.0);
    const bool absent = !params_.has("warmup_max_lr");
    number("warmup_max_lr", 0.001);
    if (absent && params_.source().origins[params_.path("warmup_max_lr")] == "default") {
      params_.source().warn(params_.path("warmup_max_lr"),
                            "absent, so DeepSpeed's default 0.001 replaces optimizer.params.lr");
    }
  }

 private:
  ConfigSection& params_;
  SchedulerConfig& scheduler_;
};

/// Momentum cycling is DeepSpeed's default; it would change Adam's betas, which bitfall keeps.
void refuse_momentum_cycle(ConfigSection& params) {
  if (params.flag("cycle_momentum", true)) {
    params.refuse("cycle_momentum", true,
                  "false: bitfall cycles the learning rate only (true is DeepSpeed's default)");
  }
  params.ignore({"cycle_min_mom", "cycle_max_mom", "decay_mom_rate"});
}

void read_one_cycle(ConfigSection& params, SchedulerConfig& scheduler) {
  SchedulerReader reader(params, scheduler);
  reader.required("cycle_min_lr");
  reader.required("cycle_max_lr");
  reader.number("decay_lr_rate", 0.0);
  reader.number("cycle_first_step_size", 2000, kCount);
  reader.number("cycle_second_step_size", scheduler.params["cycle_first_step_size"], kCount);
  reader.number("decay_step_size", 0.0);
  refuse_momentum_cycle(params);
  params.ignore({"cycle_first_stair_count", "cycle_second_stair_count"});
}

void read_params(ConfigSection& params, SchedulerConfig& scheduler) {
  SchedulerReader reader(params, scheduler);
  const std::string& type = scheduler.type;
  if (is_one_of(kHuggingFaceTypes, type)) {
    reader.integer("num_warmup_steps", 0);
    reader.training_steps("num_training_steps");
  } else if (type == "WarmupCosineLR") {
    reader.training_steps("total_num_steps");
    reader.integer("warmup_num_steps", 1000);
    reader.number("warmup_min_ratio", 0.0, {0, 1});
    reader.number("cos_min_ratio", 0.0001, {0, 1});
    reader.warmup_type();
  } else if (type == "OneCycle") {
    read_one_cycle(params, scheduler);
  } else if (type == "LRRangeTest") {
    reader.number("lr_range_test_min_lr", 0.001);
    reader.number("lr_range_test_step_size", 2000, kCount);
    reader.number("lr_range_test_step_rate", 1.0);
    scheduler.params["lr_range_test_staircase"] =
        params.flag("lr_range_test_staircase", false) ? 1.0 : 0.0;
  } else {
    if (type == "WarmupDecayLR") reader.training_steps("total_num_steps");
    reader.integer("warmup_num_steps", 1000);
    reader.warmup_rates();
    reader.warmup_type();
  }
  params.only_off({"last_batch_iteration"});
}

/// --lr_scheduler_type beside a scheduler in the file must mean the same.
void check_flag_agrees(ConfigSection& section, const std::string& type) {
  const FlagValue* flag = section.source().flag("bitfall.lr_scheduler_type");
  if (flag == nullptr || !flag->given) return;
  const json value = flag_value(*flag);
  const bool agrees = value == type || (value == "linear" && type == "WarmupDecayLR") ||
                      (value == "constant_with_warmup" && type == "WarmupLR") ||
                      (value == "cosine" && type == "WarmupCosineLR");
  if (agrees) return;
  section.refuse("type", type,
                 concat("the same schedule as ", flag->flag, " ", flag->json,
                        "; drop the flag or the scheduler section"));
}

}  // namespace

void read_scheduler(ConfigSection& root, Config& config) {
  const bool in_file = root.has("scheduler");
  ConfigSection section =
      root.section("scheduler", in_file ? FillAbsent::given_flags : FillAbsent::all_flags);
  std::vector<std::string> types = kDeepSpeedTypes;
  types.insert(types.end(), kHuggingFaceTypes.begin(), kHuggingFaceTypes.end());
  const FlagValue* flag = root.source().flag("bitfall.lr_scheduler_type");
  if (!in_file && flag != nullptr) {
    section.put("type", flag_value(*flag), concat("flag ", flag->flag));
    const json type = flag_value(*flag);
    if (!type.is_string() || !is_one_of(kHuggingFaceTypes, type)) {
      std::string expected = "one of";
      for (const std::string& name : kHuggingFaceTypes) expected += " " + name;
      section.refuse("type", type, expected);
    }
    config.scheduler.type = type;
  } else {
    config.scheduler.type = section.choice("type", types, config.scheduler.type);
    if (in_file) check_flag_agrees(section, config.scheduler.type);
  }
  ConfigSection params = section.section("params");
  read_params(params, config.scheduler);
  params.finish();
  section.finish();
}

}  // namespace bitfall
