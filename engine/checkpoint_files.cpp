#include "engine/checkpoint_files.h"

#include <fcntl.h>
#include <stdio.h>
#include <unistd.h>
#include <zlib.h>

#include <array>
#include <cerrno>
#include <cstring>
#include <fstream>
#include <nlohmann/json.hpp>
#include <sstream>

#include "core/error.h"

namespace bitfall {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;

constexpr const char* kAdvice =
    "; resume from another checkpoint (resume_from_checkpoint with its tag)";

[[noreturn]] void fail(const fs::path& path, const std::string& action, int error) {
  throw CheckpointError(concat(path.string(), ": cannot ", action, ": ", std::strerror(error),
                               "; earlier checkpoints are untouched"));
}

/// Makes renames in `folder` durable.
void sync_folder(const fs::path& folder) {
  const int descriptor = ::open(folder.c_str(), O_RDONLY | O_DIRECTORY);
  if (descriptor < 0) fail(folder, "open the folder", errno);
  const int result = ::fsync(descriptor);
  const int error = errno;
  ::close(descriptor);
  // Some network file systems have no fsync for folders.
  if (result != 0 && error != EINVAL) fail(folder, "sync the folder", error);
}

struct Checksum {
  std::uintmax_t bytes = 0;
  std::string crc32;
};

Checksum checksum(const fs::path& file) {
  std::ifstream stream(file, std::ios::binary);
  check<CheckpointError>(stream.is_open(), file.string(), ": cannot read this file", kAdvice);
  Checksum result;
  uLong crc = ::crc32(0, nullptr, 0);
  std::vector<char> chunk(1 << 20);
  while (stream) {
    stream.read(chunk.data(), static_cast<std::streamsize>(chunk.size()));
    const auto count = static_cast<uInt>(stream.gcount());
    crc = ::crc32(crc, reinterpret_cast<const Bytef*>(chunk.data()), count);
    result.bytes += count;
  }
  std::ostringstream text;
  text << std::hex << crc;
  result.crc32 = text.str();
  return result;
}

}  // namespace

StagedFolder::StagedFolder(const fs::path& directory, const std::string& name)
    : directory_(directory), target_(directory / name), staged_(directory / ("." + name + ".tmp")) {
  std::error_code error;
  fs::create_directories(directory_, error);
  if (error) fail(directory_, "create the folder", error.value());
  fs::remove_all(staged_, error);  // left by a run that was killed
  fs::create_directory(staged_, error);
  if (error) fail(staged_, "create the folder", error.value());
}

StagedFolder::~StagedFolder() {
  std::error_code ignored;
  fs::remove_all(staged_, ignored);
}

void StagedFolder::commit() {
  sync_folder(staged_);
  if (!fs::exists(target_)) {
    if (::rename(staged_.c_str(), target_.c_str()) != 0) fail(target_, "rename to it", errno);
  } else if (::renameat2(AT_FDCWD, staged_.c_str(), AT_FDCWD, target_.c_str(), RENAME_EXCHANGE) !=
             0) {
    // No exchange on this file system: the old one goes first, so for a moment there is none.
    const int error = errno;
    if (error != EINVAL && error != ENOSYS) fail(target_, "replace it", error);
    std::error_code ignored;
    fs::remove_all(target_, ignored);
    if (::rename(staged_.c_str(), target_.c_str()) != 0) fail(target_, "rename to it", errno);
  }
  sync_folder(directory_);
}

std::string checksums_of(const fs::path& folder, const std::vector<std::string>& files) {
  json document;
  for (const std::string& file : files) {
    const Checksum sum = checksum(folder / file);
    document[file] = {{"bytes", sum.bytes}, {"crc32", sum.crc32}};
  }
  return document.dump(2) + "\n";
}

void verify_checksums(const fs::path& folder, const std::vector<std::string>& files) {
  const fs::path list = folder / kChecksumFile;
  const json expected = json::parse(read_text(list), nullptr, false);
  check<CheckpointError>(expected.is_object(), list.string(), ": damaged", kAdvice);
  for (const std::string& file : files) {
    const fs::path path = folder / file;
    const json entry = expected.value(file, json());
    check<CheckpointError>(entry.is_object() && entry.contains("bytes") && entry.contains("crc32"),
                           list.string(), ": damaged, it has no checksum of ", file, kAdvice);
    const Checksum seen = checksum(path);
    check<CheckpointError>(entry["bytes"] == seen.bytes, path.string(), ": ", seen.bytes,
                           " bytes instead of ", entry["bytes"].dump(), ", it is cut short",
                           kAdvice);
    check<CheckpointError>(entry["crc32"] == seen.crc32, path.string(),
                           ": its bytes have changed since it was written (CRC-32 ", seen.crc32,
                           " instead of ", entry["crc32"].dump(), ")", kAdvice);
  }
}

std::string read_text(const fs::path& file) {
  std::ifstream stream(file, std::ios::binary);
  std::ostringstream text;
  text << stream.rdbuf();
  check<CheckpointError>(stream.is_open() && stream, file.string(), ": cannot read this file",
                         kAdvice);
  return text.str();
}

}  // namespace bitfall
