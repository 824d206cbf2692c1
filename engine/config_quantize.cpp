#include <utility>

#include "core/error.h"
#include "engine/config_parts.h"

namespace bitfall {
namespace {

using nlohmann::json;

constexpr Range kBits{1, 16};
constexpr Range kChangeRatio{0, 1, Range::Ends::open_low};

QuantType to_q_type(const std::string& text) {
  return text == "asymmetric" ? QuantType::asymmetric : QuantType::symmetric;
}

Rounding to_rounding(const std::string& text) {
  return text == "stochastic" ? Rounding::stochastic : Rounding::nearest;
}

const std::vector<std::string> kQTypes = {"symmetric", "asymmetric"};
const std::vector<std::string> kRoundings = {"nearest", "stochastic"};

void read_bits(ConfigSection& section, QuantizeGroupConfig& group) {
  group.start_bits = static_cast<int>(section.integer("start_bits", kBits, group.start_bits));
  group.target_bits = static_cast<int>(section.integer("target_bits", kBits, group.target_bits));
  if (group.target_bits > group.start_bits) {
    section.refuse("target_bits", group.target_bits,
                   concat("at most start_bits (", group.start_bits, "): training goes down"));
  }
}

void read_mix(ConfigSection& section, QuantizeConfig& quantize) {
  ConfigSection mix = section.section("fp16_mixed_quantize");
  quantize.mixed_enabled = mix.flag("enabled", false);
  quantize.change_ratio = mix.number("quantize_change_ratio", kChangeRatio, quantize.change_ratio);
  mix.finish();
}

void read_kernel_flag(ConfigSection& section) {
  if (section.flag("quantizer_kernel", false)) {
    section.source().warn(section.path("quantizer_kernel"),
                          "has no meaning here: there is one arithmetic for all devices");
  }
}

/// Ternary and binary weights are defined for one combination only.
void check_few_bits(const ConfigSection& section, const std::string& key,
                    const QuantizeConfig& quantize, const QuantizeGroupConfig& group) {
  if (group.target_bits > 2) return;
  if (quantize.q_type == QuantType::symmetric && quantize.rounding == Rounding::nearest) return;
  section.refuse(key, group.target_bits,
                 "at least 3 with asymmetric quantization or stochastic rounding: 2 bits (ternary) "
                 "and 1 bit (binary) need symmetric and nearest");
}

void check_off_by_mistake(ConfigSection& section, const QuantizeConfig& quantize) {
  if (!quantize.enabled && section.in_file() && !section.has("enabled")) {
    section.source().warn(section.path("enabled"), "absent, so quantization is off; write true");
  }
  for (const QuantizeGroupConfig& group : quantize.groups) {
    if (!quantize.enabled || group.target_bits < 16) continue;
    section.source().warn(section.path(),
                          concat(group.name.empty() ? "" : group.name + ": ",
                                 "target_bits is 16, so no weight is ever quantized"));
  }
}

/// The tutorial spells quantize_algo with a hyphen; other configs have a top-level quantize_type.
void read_algorithm(ConfigSection& section, QuantizeConfig& quantize) {
  const bool hyphen = section.has("quantize-algo");
  if (hyphen && section.has("quantize_algo")) {
    section.refuse("quantize-algo", *section.take("quantize-algo"),
                   "either \"quantize_algo\" or \"quantize-algo\", not both");
  }
  if (hyphen) section.source().warn(section.path("quantize-algo"), "read as \"quantize_algo\"");
  ConfigSection algo = section.section(hyphen ? "quantize-algo" : "quantize_algo");
  std::string q_type = algo.choice("q_type", kQTypes, "symmetric");
  quantize.rounding = to_rounding(algo.choice("rounding", kRoundings, "nearest"));
  algo.finish();
  if (section.has("quantize_type")) {
    const std::string alias = section.choice("quantize_type", kQTypes, "symmetric");
    section.source().warn(section.path("quantize_type"), "read as \"quantize_algo.q_type\"");
    if (algo.has("q_type") && alias != q_type) {
      section.refuse("quantize_type", alias,
                     concat("the same as quantize_algo.q_type (\"", q_type, "\")"));
    }
    q_type = alias;
    algo.put("q_type", alias, "file");
  }
  quantize.q_type = to_q_type(q_type);
}

void read_schedule(ConfigSection& section, QuantizeConfig& quantize, QuantizeGroupConfig& group) {
  ConfigSection schedule = section.section("quantize_schedule");
  group.quantize_period = schedule.integer("quantize_period", kCount, group.quantize_period);
  quantize.schedule_offset =
      schedule.integer("schedule_offset", kNonNegativeCount, quantize.schedule_offset);
  const std::string clock = schedule.choice("clock", {"step", "deepspeed-0.6"}, "step");
  quantize.clock = clock == "step" ? ScheduleClock::step : ScheduleClock::deepspeed_0_6;
  schedule.finish();
}

void read_eigenvalue(ConfigSection section, EigenvalueConfig& eigenvalue) {
  eigenvalue.enabled = section.flag("enabled", false);
  eigenvalue.verbose = section.flag("verbose", false);
  eigenvalue.max_iter = static_cast<int>(section.integer("max_iter", {1, 1 << 20}, 100));
  eigenvalue.tol = section.number("tol", {0, kMaxReal, Range::Ends::open_low}, eigenvalue.tol);
  eigenvalue.stability = section.number("stability", kNonNegative, eigenvalue.stability);
  eigenvalue.gas_boundary_resolution =
      section.integer("gas_boundary_resolution", kCount, eigenvalue.gas_boundary_resolution);
  eigenvalue.layer_name = section.text("layer_name", eigenvalue.layer_name);
  if (eigenvalue.layer_name.empty()) {
    section.refuse("layer_name", "", "the path of the model's layers, \"bert.encoder.layer\"");
  }
  eigenvalue.layer_num = static_cast<int>(section.integer("layer_num", {0, 1 << 20}, 0));
  section.finish();
}

void read_quantize_training(ConfigSection& section, QuantizeConfig& quantize) {
  quantize.enabled = section.flag("enabled", false);
  QuantizeGroupConfig group;
  ConfigSection bits = section.section("quantize_bits");
  read_bits(bits, group);
  bits.finish();
  read_schedule(section, quantize, group);
  quantize.quantize_groups = section.integer("quantize_groups", kCount, quantize.quantize_groups);
  read_algorithm(section, quantize);
  read_mix(section, quantize);
  quantize.verbose = section.flag("quantize_verbose", false);
  read_kernel_flag(section);
  group.modules = section.patterns("modules");
  group.exclude_modules = section.patterns("exclude_modules");
  check_few_bits(bits, "target_bits", quantize, group);
  quantize.groups = {std::move(group)};
  section.ignore({"quantize_eigenvalue"});
  check_off_by_mistake(section, quantize);
}

QuantizeGroupConfig read_different_group(ConfigSection section, const std::string& name,
                                         const QuantizeConfig& quantize) {
  QuantizeGroupConfig group;
  group.name = name;
  ConfigSection params = section.section("params");
  for (const char* key : {"start_bits", "target_bits"}) {
    if (params.has(key)) continue;
    throw ConfigError(concat(section.source().where(params.path(key)), ": missing; write 1..16"));
  }
  read_bits(params, group);
  group.quantize_period = params.integer("quantization_period", kCount, group.quantize_period);
  if (!params.has("quantization_period")) {
    section.source().warn(params.path("quantization_period"),
                          "absent: 100 steps (compression_training of DeepSpeed used 1)");
  }
  params.finish();
  group.modules = section.patterns("modules");
  group.exclude_modules = section.patterns("exclude_modules");
  const json* related = section.take("related_modules");
  if (related != nullptr && !related->is_null()) section.ignore({"related_modules"});
  check_few_bits(params, "target_bits", quantize, group);
  section.finish();
  return group;
}

void read_shared_parameters(ConfigSection& shared, QuantizeConfig& quantize) {
  quantize.enabled = shared.flag("enabled", false);
  read_kernel_flag(shared);
  quantize.schedule_offset =
      shared.integer("schedule_offset", kNonNegativeCount, quantize.schedule_offset);
  quantize.quantize_groups = shared.integer("quantize_groups", kCount, quantize.quantize_groups);
  quantize.verbose = shared.flag("quantize_verbose", false);
  quantize.q_type = to_q_type(shared.choice("quantization_type", kQTypes, "symmetric"));
  quantize.rounding = to_rounding(shared.choice("rounding", kRoundings, "nearest"));
  if (shared.flag("quantize_weight_in_forward", false)) {
    shared.refuse("quantize_weight_in_forward", true,
                  "false: quantization in the forward pass only is not supported; MoQ quantizes "
                  "the working weights after each optimizer step");
  }
  read_mix(shared, quantize);
  shared.finish();
}

void read_weight_quantization(ConfigSection section, QuantizeConfig& quantize) {
  ConfigSection shared = section.section("shared_parameters");
  read_shared_parameters(shared, quantize);
  if (quantize.enabled && !shared.has("schedule_offset")) {
    shared.source().warn(shared.path("schedule_offset"),
                         "absent: 100 steps (compression_training of DeepSpeed used 0)");
  }
  ConfigSection groups = section.section("different_groups");
  for (const std::string& name : groups.keys()) {
    quantize.groups.push_back(read_different_group(groups.section(name), name, quantize));
  }
  if (quantize.enabled && quantize.groups.empty()) {
    throw ConfigError(
        concat(section.source().where(section.path("different_groups")),
               ": missing or empty; name at least one group with params and modules"));
  }
  check_off_by_mistake(shared, quantize);
  section.finish();
}

void read_compression_training(ConfigSection section, QuantizeConfig& quantize) {
  if (section.has("weight_quantization")) {
    read_weight_quantization(section.section("weight_quantization"), quantize);
  }
  for (const std::string& key : section.keys()) {
    if (key == "layer_reduction") section.only_off({key});
    if (key != "activation_quantization" && !key.ends_with("_pruning")) continue;
    ConfigSection technique = section.section(key);
    technique.section("shared_parameters").only_off({"enabled"});
    technique.take("different_groups");
    technique.finish();
  }
  section.finish();
}

}  // namespace

void read_quantization(ConfigSection& root, Config& config) {
  ConfigSection training = root.section("quantize_training");
  read_quantize_training(training, config.quantize);
  if (root.has("compression_training")) {
    QuantizeConfig compression;
    read_compression_training(root.section("compression_training"), compression);
    if (compression.enabled && config.quantize.enabled) {
      throw ConfigError(concat(root.source().where("compression_training"),
                               ": quantize_training is enabled too; keep one of the two"));
    }
    if (compression.enabled) config.quantize = std::move(compression);
  }
  const bool at_top = root.has("eigenvalue");
  if (at_top && training.has("eigenvalue")) {
    throw ConfigError(concat(root.source().where("eigenvalue"),
                             ": quantize_training.eigenvalue is there too; keep one of the two"));
  }
  read_eigenvalue((at_top ? root : training).section("eigenvalue"), config.eigenvalue);
  training.finish();
  if (config.eigenvalue.enabled && !config.quantize.enabled) {
    root.source().warn(at_top ? "eigenvalue" : "quantize_training.eigenvalue",
                       "off, because quantization is not enabled");
    config.eigenvalue.enabled = false;
  }
}

}  // namespace bitfall
