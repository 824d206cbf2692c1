// Folders that appear whole, and checksums of the files in them. Private to the checkpoint.
#pragma once

#include <filesystem>
#include <string>
#include <vector>

namespace bitfall {

/// A folder that is filled under a temporary name and then takes its place in one moment.
class StagedFolder {
 public:
  /// Creates DIRECTORY (and its parents) and an empty temporary folder in it. Throws
  /// CheckpointError.
  StagedFolder(const std::filesystem::path& directory, const std::string& name);
  /// Removes the temporary folder unless commit() has succeeded.
  ~StagedFolder();
  StagedFolder(const StagedFolder&) = delete;
  StagedFolder& operator=(const StagedFolder&) = delete;

  const std::filesystem::path& path() const { return staged_; }
  /// Makes the folder durable under its name, in place of an older one. Throws CheckpointError.
  void commit();

 private:
  std::filesystem::path directory_, target_, staged_;
};

/// Text of checksums.json: {"file": {"bytes": n, "crc32": "89abcdef"}, ...}.
std::string checksums_of(const std::filesystem::path& folder,
                         const std::vector<std::string>& files);

/// Throws CheckpointError that names the first file of `folder` that is missing, cut short or
/// changed since checksums.json was written.
void verify_checksums(const std::filesystem::path& folder, const std::vector<std::string>& files);

/// Whole file. Throws CheckpointError that names it.
std::string read_text(const std::filesystem::path& file);

inline constexpr const char* kChecksumFile = "checksums.json";

}  // namespace bitfall
