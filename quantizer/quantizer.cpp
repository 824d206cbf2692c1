#include "quantizer/quantizer.h"

#include <algorithm>
#include <numeric>
#include <regex>

#include "quantizer/quant_math.h"

namespace bitfall {
namespace {

std::string group_label(const QuantizeGroupConfig& group) {
  return group.name.empty() ? "quantize_training" : "quantize group '" + group.name + "'";
}

/// One regular expression of a config, and whether it was of any use.
class Pattern {
 public:
  Pattern(const QuantizeGroupConfig& group, const char* key, const std::string& text)
      : where_(concat(group_label(group), ": ", key, " pattern '", text, "'")) {
    try {
      regex_.assign(text);
    } catch (const std::regex_error& error) {
      throw ConfigError(concat(where_, " is no regular expression (", error.what(),
                               "); '.*' matches everything"));
    }
  }

  /// Searches the parameter's name and, as DeepSpeed does, its module's.
  bool found_in(const std::string& name) {
    const std::string module = name.substr(0, name.rfind('.'));
    const bool found = std::regex_search(name, regex_) || std::regex_search(module, regex_);
    used_ = used_ || found;
    return found;
  }

  /// `what` the pattern was tried on.
  void check_used(const char* what) const {
    check<ConfigError>(used_, where_, " matches no ", what, ": correct or remove it");
  }

 private:
  std::string where_;
  std::regex regex_;
  bool used_ = false;
};

std::vector<Pattern> compile(const QuantizeGroupConfig& group, const char* key,
                             const std::vector<std::string>& texts) {
  std::vector<Pattern> patterns;
  patterns.reserve(texts.size());
  for (const std::string& text : texts) patterns.emplace_back(group, key, text);
  return patterns;
}

bool any_found(std::vector<Pattern>& patterns, const std::string& name) {
  bool found = false;
  // Every pattern is tried, so that each learns whether it is of use.
  for (Pattern& pattern : patterns) found = pattern.found_in(name) || found;
  return found;
}

/// Indices of the parameters that `group` selects.
std::vector<std::size_t> select(const QuantizeGroupConfig& group,
                                const std::vector<Parameter>& parameters) {
  std::vector<Pattern> included = compile(group, "modules", group.modules);
  std::vector<Pattern> excluded = compile(group, "exclude_modules", group.exclude_modules);
  std::vector<std::size_t> selected;
  for (std::size_t index = 0; index < parameters.size(); ++index) {
    const Parameter& parameter = parameters[index];
    const bool refused = any_found(excluded, parameter.name);
    if (parameter.shape.rank() < 2) continue;
    const bool wanted = any_found(included, parameter.name) || group.modules.empty();
    if (wanted && !refused) selected.push_back(index);
  }
  for (const Pattern& pattern : included)
    pattern.check_used("parameter with two or more dimensions");
  for (const Pattern& pattern : excluded) pattern.check_used("parameter");
  check<ConfigError>(!selected.empty(), group_label(group),
                     " selects no parameter: exclude_modules removes all that modules selects");
  return selected;
}

/// Per parameter: the quantize group that selects it.
std::vector<std::optional<int>> group_of_parameters(const QuantizeConfig& config,
                                                    const std::vector<Parameter>& parameters) {
  std::vector<std::optional<int>> groups(parameters.size());
  for (std::size_t group = 0; group < config.groups.size(); ++group) {
    for (const std::size_t index : select(config.groups[group], parameters)) {
      check<ConfigError>(!groups[index].has_value(), "parameter '", parameters[index].name,
                         "' belongs to two quantize groups, '",
                         config.groups[static_cast<std::size_t>(groups[index].value_or(0))].name,
                         "' and '", config.groups[group].name,
                         "': narrow modules or exclude_modules of one of them");
      groups[index] = static_cast<int>(group);
    }
  }
  return groups;
}

std::int64_t largest_divisor_up_to(std::int64_t limit, std::int64_t numel) {
  while (numel % limit != 0) --limit;
  return limit;
}

std::int64_t smallest_divisor_from(std::int64_t limit, std::int64_t numel) {
  while (limit < numel && numel % limit != 0) ++limit;
  return std::min(limit, numel);
}

/// `common` is the greatest common divisor of all selected sizes.
void check_divides(const Parameter& parameter, std::int64_t groups, std::int64_t common) {
  if (parameter.numel % groups == 0) return;
  throw ConfigError(
      concat("quantize_groups = ", groups, " does not divide parameter '", parameter.name, "' of ",
             parameter.numel, " elements ", parameter.shape.to_string(),
             ": its nearest divisors are ", largest_divisor_up_to(groups, parameter.numel), " and ",
             smallest_divisor_from(groups, parameter.numel),
             "; quantize_groups = ", largest_divisor_up_to(groups, common),
             " suits all quantized parameters, or exclude this one with exclude_modules"));
}

}  // namespace

std::vector<BitStateSpec> bit_states(const QuantizeConfig& config,
                                     const std::vector<Parameter>& parameters,
                                     const std::string& layer_name) {
  const std::vector<std::optional<int>> groups = group_of_parameters(config, parameters);
  std::vector<BitStateSpec> states;
  const auto add_if_used = [&](int group, int block, const std::string& name) {
    for (std::size_t index = 0; index < parameters.size(); ++index) {
      if (groups[index] != group || parameters[index].block != block) continue;
      const std::string& prefix = config.groups[static_cast<std::size_t>(group)].name;
      states.push_back({config.groups.size() > 1 ? concat(prefix, "/", name) : name, block, group});
      return;
    }
  };
  int num_blocks = 0;
  for (const Parameter& parameter : parameters)
    num_blocks = std::max(num_blocks, parameter.block + 1);
  for (int group = 0; group < static_cast<int>(config.groups.size()); ++group) {
    for (int block = 0; block < num_blocks; ++block)
      add_if_used(group, block, concat(layer_name, ".", block));
    add_if_used(group, kNoBlock, "other");
  }
  return states;
}

std::vector<std::int64_t> elements_per_scale(const QuantizeConfig& config,
                                             const std::vector<Parameter>& parameters) {
  const std::vector<std::optional<int>> groups = group_of_parameters(config, parameters);
  std::vector<std::int64_t> result(parameters.size(), 1);
  for (std::size_t index = 0; index < parameters.size(); ++index) {
    if (groups[index]) {
      result[index] = std::max<std::int64_t>(1, parameters[index].numel / config.quantize_groups);
    }
  }
  return result;
}

Quantizer::Quantizer(const QuantizeConfig& config, const ParameterStore& store,
                     const BitSchedule& schedule, std::uint64_t seed)
    : config_(config), schedule_(schedule), seed_(seed) {
  check<ConfigError>(!store.working_is_master(),
                     "quantized training needs working weights apart from the masters: create the "
                     "ParameterStore with WorkingCopy::separate");
  check<ConfigError>(config.quantize_groups >= 1, "quantize_groups = ", config.quantize_groups,
                     ": expected at least 1");
  const std::vector<Parameter>& parameters = store.parameters();
  const std::vector<std::optional<int>> groups = group_of_parameters(config, parameters);
  const std::vector<BitStateSpec>& specs = schedule.specs();
  std::int64_t common = 0;
  for (std::size_t index = 0; index < parameters.size(); ++index) {
    states_.emplace_back();
    if (!groups[index]) continue;
    common = std::gcd(common, parameters[index].numel);
    const auto state = std::find_if(specs.begin(), specs.end(), [&](const BitStateSpec& spec) {
      return spec.group == *groups[index] && spec.block == parameters[index].block;
    });
    check<ConfigError>(state != specs.end(), "the bit schedule has no state for parameter '",
                       parameters[index].name, "'");
    states_.back() = static_cast<std::size_t>(state - specs.begin());
  }
  for (std::size_t index = 0; index < parameters.size(); ++index) {
    if (groups[index]) check_divides(parameters[index], config.quantize_groups, common);
  }
  for (const QuantizeGroupConfig& group : config.groups) {
    check_quant_spec({.bits = group.target_bits,
                      .groups = 1,
                      .q_type = config.q_type,
                      .rounding = config.rounding},
                     common);
  }
}

QuantSpec Quantizer::spec(std::size_t parameter) const {
  const bool active = schedule_.quantizing() && selects(parameter);
  return {.bits = active ? std::min(schedule_.bits(*states_[parameter]), kCastBits) : kCastBits,
          .groups = config_.quantize_groups,
          .q_type = config_.q_type,
          .rounding = config_.rounding};
}

StochasticKey Quantizer::key(std::size_t parameter, std::int64_t step) const {
  return {seed_, static_cast<std::uint64_t>(step), static_cast<std::uint32_t>(parameter)};
}

std::vector<FakeQuantizeRange> Quantizer::ranges(const ParameterStore& store,
                                                 std::int64_t step) const {
  std::vector<FakeQuantizeRange> result;
  for (const OwnedPart& mine : store.owned_parts()) {
    const std::size_t index = mine.parameter;
    const Parameter& parameter = store.parameters()[index];
    FakeQuantizeRange range{mine.begin, mine.numel, spec(index)};
    // Without it, ranges stay the same from step to step, which spares a GPU their upload.
    if (config_.rounding == Rounding::stochastic) range.key = key(index, step);
    range.key.first_element = mine.first_element;
    range.spec.groups = selects(index) ? mine.numel / (parameter.numel / range.spec.groups) : 1;
    if (selects(index)) range.mix = static_cast<float>(schedule_.mix(*states_[index]));
    result.push_back(range);
  }
  return result;
}

void Quantizer::publish(Backend& backend, ParameterStore& store, std::int64_t step) {
  backend.fake_quantize(ranges(store, step), store.master(), store.working(store.owned()));
}

void Quantizer::quantize_into(Backend& backend, const ParameterStore& store, std::int64_t step,
                              const Tensor& flat_f32) const {
  check<UnsupportedError>(flat_f32.dtype == DType::f32, "quantize_into: the buffer is ",
                          name(flat_f32.dtype), ", expected f32");
  check_shape("flat parameter buffer", flat_f32, Shape{store.numel()});
  std::vector<FakeQuantizeRange> unmixed = ranges(store, step);
  for (FakeQuantizeRange& range : unmixed) range.mix = 0;
  backend.fake_quantize(unmixed, store.master(),
                        flat_f32.flat_slice(store.owned().begin, store.owned().numel));
}

}  // namespace bitfall
