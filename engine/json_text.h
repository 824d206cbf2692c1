// JSON as people write it: comments and trailing commas are accepted, duplicate keys are not.
#pragma once

#include <map>
#include <nlohmann/json.hpp>
#include <string>

namespace bitfall {

struct JsonText {
  nlohmann::json value;
  std::map<std::string, int> lines;  ///< key path ("optimizer.params.lr") -> line of the key
};

/// Parses `text`. `//`, `#` and `/* */` comments and a comma before `}` or `]` are skipped.
///
/// Throws ConfigError "source:line:column: ..." for a syntax error, a key that occurs twice in one
/// object, a number that does not fit a double, or nesting deeper than 64.
JsonText parse_json_text(const std::string& text, const std::string& source);

}  // namespace bitfall
