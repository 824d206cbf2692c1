#include "engine/json_text.h"

#include <algorithm>
#include <cctype>
#include <string_view>
#include <vector>

#include "core/error.h"

namespace bitfall {
namespace {

using nlohmann::json;

constexpr std::size_t kMaxDepth = 64;  // ds_configs need 6; keeps later recursion bounded

/// "source:line:column: " of a byte.
std::string position(const std::string& source, const std::string& text, std::size_t byte) {
  byte = std::min(byte, text.size());
  const auto begin = text.begin();
  const auto end = begin + static_cast<std::ptrdiff_t>(byte);
  const auto line = std::count(begin, end, '\n') + 1;
  const std::size_t newline = byte == 0 ? std::string::npos : text.rfind('\n', byte - 1);
  const std::size_t column = newline == std::string::npos ? byte + 1 : byte - newline;
  return concat(source, ":", line, ":", column, ": ");
}

/// Blanks comments and trailing commas (so that positions stay), and notes where each key stands.
class Scanner {
 public:
  Scanner(const std::string& text, const std::string& source)
      : text_(text), source_(source), clean_(text) {}

  void run() {
    while (at_ < text_.size()) {
      if (starts("//") || text_[at_] == '#') {
        blank_until("\n");
      } else if (starts("/*")) {
        blank_until("*/");
      } else if (text_[at_] == '"') {
        string();
      } else {
        mark(text_[at_]);
        ++at_;
      }
    }
  }

  const std::string& clean() const { return clean_; }
  std::map<std::string, int> lines;

 private:
  /// An open object or array.
  struct Frame {
    std::string path;
    std::map<std::string, std::size_t> keys;  ///< key -> byte
    std::string key;                          ///< the last one
  };

  bool starts(std::string_view token) const { return text_.compare(at_, token.size(), token) == 0; }

  void blank_until(std::string_view end) {
    std::size_t stop = text_.find(end, at_ + (end == "*/" ? 2 : 0));
    if (stop == std::string::npos) {
      check<ConfigError>(end != "*/", position(source_, text_, at_),
                         "this comment is never closed: add */");
      stop = text_.size();
    }
    stop = std::min(text_.size(), end == "\n" ? stop : stop + end.size());
    for (; at_ < stop; ++at_) {
      if (text_[at_] != '\n') clean_[at_] = ' ';
    }
  }

  void string() {
    string_begin_ = at_++;
    while (at_ < text_.size() && text_[at_] != '"' && text_[at_] != '\n') {
      at_ += text_[at_] == '\\' ? 2 : 1;
    }
    check<ConfigError>(at_ < text_.size() && text_[at_] == '"',
                       position(source_, text_, string_begin_), "this string is never closed");
    ++at_;
    string_end_ = at_;
    before_last_ = last_;
    last_ = '"';
  }

  void mark(char c) {
    if (std::isspace(static_cast<unsigned char>(c))) return;
    if (c == ':' && last_ == '"' && !frames_.empty()) key();
    if (c == '{' || c == '[') open();
    if (c == '}' || c == ']') close();
    if (c == ',') comma_ = at_;
    before_last_ = last_;
    last_ = c;
  }

  void key() {
    const auto token = text_.substr(string_begin_, string_end_ - string_begin_);
    const json decoded = json::parse(token, nullptr, false);
    if (decoded.is_discarded()) return;  // the parser proper reports it
    Frame& frame = frames_.back();
    frame.key = decoded.get<std::string>();
    const auto [earlier, is_new] = frame.keys.emplace(frame.key, string_begin_);
    const std::string path = frame.path.empty() ? frame.key : frame.path + "." + frame.key;
    const auto line_of = [this](std::size_t byte) {
      const auto end = text_.begin() + static_cast<std::ptrdiff_t>(byte);
      return static_cast<int>(std::count(text_.begin(), end, '\n')) + 1;
    };
    if (!is_new) {
      throw ConfigError(concat(position(source_, text_, string_begin_), path,
                               ": this key occurs twice, first in line ", line_of(earlier->second),
                               "; keep one"));
    }
    lines.emplace(path, line_of(string_begin_));
  }

  void open() {
    check<ConfigError>(frames_.size() < kMaxDepth, position(source_, text_, at_),
                       "nested deeper than ", kMaxDepth, " levels");
    std::string path;
    if (!frames_.empty()) {
      const Frame& parent = frames_.back();
      path = parent.path.empty() ? parent.key : parent.path + "." + parent.key;
    }
    frames_.push_back({path, {}, {}});
  }

  void close() {
    const bool after_value = before_last_ != '{' && before_last_ != '[' && before_last_ != ',' &&
                             before_last_ != ':' && before_last_ != '\0';
    if (last_ == ',' && after_value) clean_[comma_] = ' ';
    if (!frames_.empty()) frames_.pop_back();
  }

  const std::string& text_;
  const std::string& source_;
  std::string clean_;
  std::vector<Frame> frames_;
  std::size_t at_ = 0, comma_ = 0, string_begin_ = 0, string_end_ = 0;
  char last_ = '\0', before_last_ = '\0';  // significant characters; '"' stands for a string
};

[[noreturn]] void rethrow(const json::parse_error& error, const std::string& source,
                          const std::string& text) {
  // "[json.exception...] parse error at line 1, column 2: syntax error while parsing value -
  // unexpected ','; expected ...". The bytes that were read last may be no valid text.
  std::string reason = error.what();
  if (const auto dash = reason.find(" - "); dash != std::string::npos) reason.erase(0, dash + 3);
  if (const auto tail = reason.find("; last read"); tail != std::string::npos) reason.erase(tail);
  const std::size_t byte = error.byte == 0 ? 0 : error.byte - 1;
  const std::size_t token = text.find_last_not_of("NaIinfty", byte);
  const std::string_view rest =
      std::string_view(text).substr(token == std::string::npos ? 0 : token + 1);
  if (rest.starts_with("NaN") || rest.starts_with("Infinity")) {
    reason = "NaN and Infinity are not JSON numbers; write a finite number";
  }
  throw ConfigError(concat(position(source, text, byte), "JSON syntax error: ", reason));
}

}  // namespace

JsonText parse_json_text(const std::string& text, const std::string& source) {
  Scanner scanner(text, source);
  scanner.run();
  try {
    return {json::parse(scanner.clean()), std::move(scanner.lines)};
  } catch (const json::parse_error& error) {
    rethrow(error, source, text);
  } catch (const json::out_of_range& error) {
    // "... number overflow parsing '1e999'"
    const std::string what = error.what();
    const auto begin = what.find('\'') + 1;
    const std::string number = what.substr(begin, what.rfind('\'') - begin);
    throw ConfigError(concat(position(source, text, scanner.clean().find(number)), "the number ",
                             number, " is too large for a double"));
  }
}

}  // namespace bitfall
