// Reader and writer of the safetensors format: 8 bytes of header length, a JSON header, the data.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "core/dtype.h"
#include "engine/atomic_file.h"

namespace bitfall {

/// What a header says of one tensor.
struct SafetensorsInfo {
  std::string name;
  std::string dtype;  ///< as in the file: "F32", "BF16", "I64", ...
  std::vector<std::int64_t> shape;

  /// "[2, 3]"
  std::string shape_text() const;
};

struct SafetensorsTensor : SafetensorsInfo {
  std::span<const std::byte> data;  ///< unaligned, little-endian, row-major
};

struct SafetensorsContent {
  std::vector<SafetensorsTensor> tensors;  ///< in the order of their data
  std::map<std::string, std::string> metadata;
};

/// "F32" for DType::f32, and so on.
std::string_view safetensors_dtype(DType dtype);

/// Reads the header of a whole file in memory; the tensors point into `file`.
///
/// Throws ModelFileError that names `source`, the tensor and what was seen for: a header length
/// beyond the file or 100 MB, malformed JSON, duplicate names, unknown dtypes, shapes whose product
/// overflows or disagrees with the offsets, and data ranges that overlap, leave gaps or end
/// elsewhere than the file.
/// Source: README of huggingface/safetensors, section "Format".
SafetensorsContent parse_safetensors(std::span<const std::byte> file, const std::string& source);

/// A safetensors file, mapped into memory for as long as the object lives.
class SafetensorsFile {
 public:
  /// Throws ModelFileError if the file cannot be read or is malformed.
  explicit SafetensorsFile(const std::filesystem::path& path);

  const std::string& path() const { return path_; }
  const std::vector<SafetensorsTensor>& tensors() const { return content_.tensors; }
  const std::map<std::string, std::string>& metadata() const { return content_.metadata; }
  /// Null if the file has no tensor of that name.
  const SafetensorsTensor* find(std::string_view name) const;
  /// As find; throws ModelFileError that names file and tensor if there is none.
  const SafetensorsTensor& at(std::string_view name) const;
  /// values [numel] = the tensor converted to f32. Throws ModelFileError for a dtype other than
  /// F64, F32, F16 and BF16 and for another number of elements.
  void read_f32(const SafetensorsTensor& tensor, std::span<float> values) const;

 private:
  std::string path_;
  std::shared_ptr<void> mapping_;
  SafetensorsContent content_;
  std::unordered_map<std::string_view, std::size_t> index_;
};

/// Writes a safetensors file tensor by tensor, so that no second copy of the weights is needed.
class SafetensorsWriter {
 public:
  /// Writes the header for `tensors`, whose data must follow in this order. Throws ModelFileError.
  SafetensorsWriter(const std::filesystem::path& path, const std::vector<SafetensorsInfo>& tensors,
                    const std::map<std::string, std::string>& metadata = {{"format", "pt"}});

  /// Data of the next tensor, or the next part of it. Throws ModelFileError.
  void write(std::span<const std::byte> data);
  /// Gives the file its name; it then is complete and durable. Throws ModelFileError if bytes are
  /// missing or too many were written, or the disk refuses; an old file of that name then stays.
  void commit();

 private:
  std::string path_;
  AtomicFile file_;
  std::uint64_t missing_bytes_ = 0;
};

}  // namespace bitfall
