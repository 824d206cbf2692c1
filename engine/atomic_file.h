// AtomicFile: a file that appears under its name only when it is complete.
//
// Written beside its destination under a temporary name, then fsync, rename and fsync of the
// folder: a crash, a kill or a full disk at any moment leaves the old file as it was.
#pragma once

#include <cstddef>
#include <filesystem>
#include <span>
#include <string_view>

namespace bitfall {

class AtomicFile {
 public:
  /// Creates the temporary file. Throws ModelFileError that names the path and the system's reason
  /// (no such folder, no permission).
  explicit AtomicFile(std::filesystem::path path);
  /// Removes the temporary file unless commit() has succeeded.
  ~AtomicFile();
  AtomicFile(const AtomicFile&) = delete;
  AtomicFile& operator=(const AtomicFile&) = delete;

  /// Appends. Throws ModelFileError (full disk, for example).
  void write(std::span<const std::byte> bytes);
  void write(std::string_view text) { write(std::as_bytes(std::span(text))); }
  /// Makes the file durable and gives it its name. Throws ModelFileError; the old file then stays.
  void commit();

 private:
  [[noreturn]] void fail(const char* action) const;

  std::filesystem::path path_, temporary_;
  int descriptor_ = -1;
};

}  // namespace bitfall
