// Parsing ds_configs in a test, and the messages of those that are refused.
#pragma once

#include <string>
#include <utility>

#include "core/error.h"
#include "engine/config.h"

namespace bitfall::test {

inline FlagValue typed(std::string flag, std::string json) {
  return {std::move(flag), std::move(json), true};
}

inline FlagValue by_default(std::string flag, std::string json) {
  return {std::move(flag), std::move(json), false};
}

inline CompletedConfig parse(const std::string& text, const FlagValues& flags = {}) {
  return parse_config(text, "test.json", flags);
}

inline std::string error_of(const std::string& text, const FlagValues& flags = {}) {
  try {
    parse(text, flags);
  } catch (const ConfigError& error) {
    return error.what();
  }
  return "no error";
}

}  // namespace bitfall::test
