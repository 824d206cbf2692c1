// ConfigSection: one JSON object of a ds_config, read key by key.
//
// Every read resolves the value (file, "auto" or absent filled from a flag, default), checks type
// and range, and writes it with its origin to the completed config. Keys that nobody asked for are
// errors.
#pragma once

#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <vector>

#include "engine/config.h"
#include "engine/json_text.h"

namespace bitfall {

/// What all sections of one parse share.
struct ConfigSource {
  std::string name;                  ///< file name for messages
  std::map<std::string, int> lines;  ///< key path -> line
  const FlagValues& flags;
  std::map<std::string, std::string> origins;
  std::vector<std::string> warnings;

  /// "test.json:12: optimizer.params.lr", without the line where none is known.
  std::string where(const std::string& path) const;
  /// The flag that fills `path` (warmup_num_steps is also filled by "bitfall.warmup_steps", ...).
  const FlagValue* flag(const std::string& path) const;
  void warn(const std::string& path, const std::string& text);
};

/// JSON value of a flag. Throws ConfigError that names the flag if its text is not JSON.
nlohmann::json flag_value(const FlagValue& flag);

/// Which flags fill a key that the file leaves out. As Hugging Face: defaults of flags fill only
/// "auto", except where there is no section in the file at all.
enum class FillAbsent { given_flags, all_flags };

struct Range {
  enum class Ends { closed, open_low, open_high };
  double low = 0, high = 0;
  Ends ends = Ends::closed;

  bool contains(double value) const;
  std::string to_string() const;
};

inline constexpr double kMaxCount = 9007199254740992.0;  ///< 2^53: exact in a double
inline constexpr double kMaxReal = 3.4028234663852886e38;
inline constexpr Range kCount{1, kMaxCount};
inline constexpr Range kNonNegativeCount{0, kMaxCount};
inline constexpr Range kNonNegative{0, kMaxReal};

class ConfigSection {
 public:
  /// `file` is the object in the user's file or null; `completed` receives the values.
  ConfigSection(ConfigSource& source, std::string path, const nlohmann::json* file,
                nlohmann::json& completed, FillAbsent fill);

  const std::string& path() const { return path_; }
  std::string path(std::string_view key) const;
  ConfigSource& source() { return source_; }
  bool in_file() const { return file_ != nullptr; }
  bool has(const std::string& key) const;

  /// File value (unless "auto") or flag value; empty: neither, so a default applies.
  ///
  /// Throws ConfigError if a given flag contradicts the file, or nothing fills an "auto".
  std::optional<nlohmann::json> find(const std::string& key);
  /// As `find`, with the type and range checked.
  std::optional<double> find_number(const std::string& key, const Range& range);
  std::optional<std::int64_t> find_integer(const std::string& key, const Range& range);

  double number(const std::string& key, const Range& range, double otherwise);
  std::int64_t integer(const std::string& key, const Range& range, std::int64_t otherwise);
  /// `otherwise` is what an absent key means.
  bool flag(const std::string& key, bool otherwise);
  std::string text(const std::string& key, const std::string& otherwise);
  /// One of `choices`.
  std::string choice(const std::string& key, const std::vector<std::string>& choices,
                     const std::string& otherwise);
  /// A list of regular expressions (or one string), each compiled once as a check.
  std::vector<std::string> patterns(const std::string& key);
  ConfigSection section(const std::string& key);
  ConfigSection section(const std::string& key, FillAbsent fill);
  /// Names of all keys in the file.
  std::vector<std::string> keys() const;

  /// Writes a value that follows from others.
  void put(const std::string& key, const nlohmann::json& value, const std::string& origin);
  /// Accepts the keys with a warning: they change nothing here.
  void ignore(const std::vector<std::string>& keys);
  /// Accepts the key if it switches something off (false, 0, 1.0 for a factor, {"enabled": false});
  /// ConfigError "not supported" otherwise.
  void only_off(const std::vector<std::string>& keys);
  /// Marks a key as known and drops it (the caller has read it under another name).
  const nlohmann::json* take(const std::string& key);
  /// Throws ConfigError for the first key that was not read, with the nearest known key.
  void finish() const;

  /// Throws ConfigError "where = value: expected ...".
  [[noreturn]] void refuse(const std::string& key, const nlohmann::json& value,
                           const std::string& expected) const;

 private:
  const nlohmann::json* raw(const std::string& key);

  ConfigSource& source_;
  std::string path_;
  const nlohmann::json* file_;
  nlohmann::json& completed_;
  FillAbsent fill_;
  std::set<std::string> known_;
};

/// The candidate with the smallest edit distance to `key`, or "" if none is near.
std::string nearest(const std::string& key, const std::vector<std::string>& candidates);

}  // namespace bitfall
