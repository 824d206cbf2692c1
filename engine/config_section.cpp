#include "engine/config_section.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <regex>

#include "core/error.h"

namespace bitfall {

using nlohmann::json;

namespace {

constexpr std::size_t kMaxPatternLength = 256;  // bounds the recursion of std::regex

/// Keys whose value may come from a flag of another key.
struct Alias {
  const char* path;
  const char* flag_path;
};
constexpr Alias kAliases[] = {
    {"scheduler.params.warmup_num_steps", "bitfall.warmup_steps"},
    {"scheduler.params.num_warmup_steps", "bitfall.warmup_steps"},
    {"scheduler.params.total_num_steps", "bitfall.num_training_steps"},
    {"scheduler.params.num_training_steps", "bitfall.num_training_steps"},
    {"scheduler.params.warmup_max_lr", "optimizer.params.lr"},
};

/// Text of a value for a message, cut if long. Never throws, whatever the user wrote.
std::string shown(const json& value) {
  std::string text = value.dump(-1, ' ', false, json::error_handler_t::replace);
  if (text.size() > 60) text = text.substr(0, 57) + "...";
  return text;
}

std::size_t edit_distance(std::string_view a, std::string_view b) {
  std::vector<std::size_t> row(b.size() + 1);
  std::iota(row.begin(), row.end(), std::size_t{0});
  for (std::size_t i = 1; i <= a.size(); ++i) {
    std::size_t diagonal = row[0];
    row[0] = i;
    for (std::size_t j = 1; j <= b.size(); ++j) {
      const std::size_t substitute = diagonal + (a[i - 1] == b[j - 1] ? 0 : 1);
      diagonal = row[j];
      row[j] = std::min({row[j] + 1, row[j - 1] + 1, substitute});
    }
  }
  return row.back();
}

}  // namespace

std::string nearest(const std::string& key, const std::vector<std::string>& candidates) {
  const std::string_view head = std::string_view(key).substr(0, 64);
  std::string best;
  std::size_t best_distance = std::max<std::size_t>(2, head.size() / 2) + 1;
  for (const std::string& candidate : candidates) {
    const std::size_t distance = edit_distance(head, candidate);
    if (distance < best_distance) {
      best_distance = distance;
      best = candidate;
    }
  }
  return best;
}

std::string ConfigSource::where(const std::string& path) const {
  const auto line = lines.find(path);
  if (line == lines.end()) return concat(name, ": ", path);
  return concat(name, ":", line->second, ": ", path);
}

const FlagValue* ConfigSource::flag(const std::string& path) const {
  if (const auto found = flags.find(path); found != flags.end()) return &found->second;
  for (const Alias& alias : kAliases) {
    if (path != alias.path) continue;
    if (const auto found = flags.find(alias.flag_path); found != flags.end()) return &found->second;
  }
  return nullptr;
}

void ConfigSource::warn(const std::string& path, const std::string& text) {
  warnings.push_back(concat(where(path), ": ", text));
}

json flag_value(const FlagValue& flag) {
  json value = json::parse(flag.json, nullptr, false);
  check<ConfigError>(!value.is_discarded(), flag.flag, ": '", flag.json, "' is not a JSON value");
  return value;
}

bool Range::contains(double value) const {
  if (!std::isfinite(value)) return false;
  const bool above = ends == Ends::open_low ? value > low : value >= low;
  const bool below = ends == Ends::open_high ? value < high : value <= high;
  return above && below;
}

std::string Range::to_string() const {
  if (high >= kMaxCount) return concat(ends == Ends::open_low ? "above " : "at least ", low);
  return concat(ends == Ends::open_low ? "above " : "from ", low,
                ends == Ends::open_high ? " to below " : " to ", high);
}

ConfigSection::ConfigSection(ConfigSource& source, std::string path, const json* file,
                             json& completed, FillAbsent fill)
    : source_(source), path_(std::move(path)), file_(file), completed_(completed), fill_(fill) {
  if (!completed_.is_object()) completed_ = json::object();
  if (file_ == nullptr || file_->is_object()) return;
  throw ConfigError(concat(source_.where(path_.empty() ? "the file" : path_), " = ", shown(*file_),
                           ": expected an object {...}"));
}

std::string ConfigSection::path(std::string_view key) const {
  return path_.empty() ? std::string(key) : concat(path_, ".", key);
}

bool ConfigSection::has(const std::string& key) const {
  return file_ != nullptr && file_->contains(key);
}

const json* ConfigSection::raw(const std::string& key) {
  known_.insert(key);
  return has(key) ? &file_->at(key) : nullptr;
}

const json* ConfigSection::take(const std::string& key) { return raw(key); }

void ConfigSection::refuse(const std::string& key, const json& value,
                           const std::string& expected) const {
  std::string origin;
  const auto found = source_.origins.find(path(key));
  if (found != source_.origins.end() && found->second.starts_with("flag ")) {
    origin = concat(" (from ", found->second.substr(5), ")");
  }
  throw ConfigError(
      concat(source_.where(path(key)), " = ", shown(value), origin, ": expected ", expected));
}

std::optional<json> ConfigSection::find(const std::string& key) {
  const json* in_file = raw(key);
  const FlagValue* flag = source_.flag(path(key));
  const bool is_auto = in_file != nullptr && *in_file == "auto";
  if (in_file != nullptr && !is_auto) {
    if (flag != nullptr && flag->given && flag_value(*flag) != *in_file) {
      throw ConfigError(concat(source_.where(path(key)), " = ", shown(*in_file), ", but ",
                               flag->flag, " is ", flag->json,
                               ": make them equal, drop the flag, or write \"auto\" in the file"));
    }
    put(key, *in_file, "file");
    return *in_file;
  }
  if (flag != nullptr && (is_auto || flag->given || fill_ == FillAbsent::all_flags)) {
    const json value = flag_value(*flag);
    put(key, value, concat("flag ", flag->flag));
    return value;
  }
  if (is_auto) refuse(key, *in_file, "a value: no command-line flag fills this key");
  return std::nullopt;
}

std::optional<double> ConfigSection::find_number(const std::string& key, const Range& range) {
  const std::optional<json> value = find(key);
  if (!value) return std::nullopt;
  if (!value->is_number()) refuse(key, *value, "a number " + range.to_string());
  if (!range.contains(value->get<double>())) refuse(key, *value, range.to_string());
  return value->get<double>();
}

std::optional<std::int64_t> ConfigSection::find_integer(const std::string& key,
                                                        const Range& range) {
  const std::optional<json> value = find(key);
  if (!value) return std::nullopt;
  const std::string expected = "an integer " + range.to_string();
  if (!value->is_number()) refuse(key, *value, expected);
  // 5e8 is an integer to a user; every range lies within what a double holds exactly.
  const double number = value->get<double>();
  if (!range.contains(number) || number != std::floor(number)) refuse(key, *value, expected);
  return static_cast<std::int64_t>(number);
}

double ConfigSection::number(const std::string& key, const Range& range, double otherwise) {
  const std::optional<double> value = find_number(key, range);
  if (!value) put(key, otherwise, "default");
  return value.value_or(otherwise);
}

std::int64_t ConfigSection::integer(const std::string& key, const Range& range,
                                    std::int64_t otherwise) {
  const std::optional<std::int64_t> value = find_integer(key, range);
  if (!value) put(key, otherwise, "default");
  return value.value_or(otherwise);
}

bool ConfigSection::flag(const std::string& key, bool otherwise) {
  const std::optional<json> value = find(key);
  if (value && !value->is_boolean()) refuse(key, *value, "true or false");
  if (!value) put(key, otherwise, "default");
  return value ? value->get<bool>() : otherwise;
}

std::string ConfigSection::text(const std::string& key, const std::string& otherwise) {
  const std::optional<json> value = find(key);
  if (value && !value->is_string()) refuse(key, *value, "a string");
  if (!value) put(key, otherwise, "default");
  return value ? value->get<std::string>() : otherwise;
}

std::string ConfigSection::choice(const std::string& key, const std::vector<std::string>& choices,
                                  const std::string& otherwise) {
  const std::string value = text(key, otherwise);
  if (std::find(choices.begin(), choices.end(), value) == choices.end()) {
    std::string expected = "one of";
    for (const std::string& name : choices) expected += " \"" + name + "\"";
    const std::string near = nearest(value, choices);
    if (!near.empty()) expected += "; did you mean \"" + near + "\"?";
    refuse(key, value, expected);
  }
  return value;
}

std::vector<std::string> ConfigSection::patterns(const std::string& key) {
  const std::optional<json> value = find(key);
  if (!value) return {};
  const std::string expected = "a list of regular expressions";
  std::vector<std::string> result;
  for (const json& item : value->is_string() ? json::array({*value}) : *value) {
    if (!item.is_string()) refuse(key, *value, expected);
    result.push_back(item.get<std::string>());
    if (result.back().size() > kMaxPatternLength) {
      refuse(key, item, concat("at most ", kMaxPatternLength, " characters in a pattern"));
    }
    try {
      // "*" alone means everything, as DeepSpeed's own default has it.
      if (result.back() != "*") std::regex check(result.back());
    } catch (const std::regex_error& error) {
      refuse(key, item, concat("a regular expression (", error.what(), ")"));
    }
  }
  if (!value->is_string() && !value->is_array()) refuse(key, *value, expected);
  if (std::find(result.begin(), result.end(), "*") != result.end()) result.clear();
  return result;
}

ConfigSection ConfigSection::section(const std::string& key) { return section(key, fill_); }

ConfigSection ConfigSection::section(const std::string& key, FillAbsent fill) {
  return ConfigSection(source_, path(key), raw(key), completed_[key], fill);
}

std::vector<std::string> ConfigSection::keys() const {
  std::vector<std::string> result;
  if (file_ == nullptr) return result;
  for (const auto& item : file_->items()) result.push_back(item.key());
  return result;
}

void ConfigSection::put(const std::string& key, const json& value, const std::string& origin) {
  known_.insert(key);
  completed_[key] = value;
  source_.origins[path(key)] = origin;
}

void ConfigSection::ignore(const std::vector<std::string>& keys) {
  for (const std::string& key : keys) {
    const json* value = raw(key);
    if (value == nullptr) continue;
    put(key, *value, "file");
    source_.warn(path(key), "ignored, it changes nothing here");
  }
}

void ConfigSection::only_off(const std::vector<std::string>& keys) {
  for (const std::string& key : keys) {
    const json* value = raw(key);
    if (value == nullptr) continue;
    const bool disabled_section =
        value->is_object() && (value->empty() || value->value("enabled", json(false)) == false);
    const bool neutral = *value == false || value->is_null() || *value == 0 || *value == 1.0;
    if (!disabled_section && !neutral) {
      throw ConfigError(concat(source_.where(path(key)), " = ", shown(*value),
                               ": not supported; remove this key or switch it off"));
    }
    put(key, *value, "file");
  }
}

void ConfigSection::finish() const {
  if (file_ == nullptr) return;
  for (const auto& item : file_->items()) {
    if (known_.contains(item.key())) continue;
    const std::string near = nearest(item.key(), {known_.begin(), known_.end()});
    std::string hint = near.empty() ? "" : concat("; did you mean \"", path(near), "\"?");
    if (hint.empty()) {
      hint = "; known keys here:";
      for (const std::string& key : known_) hint += " " + key;
    }
    throw ConfigError(concat(source_.where(path(item.key())), ": unknown key", hint));
  }
}

}  // namespace bitfall
