#include "engine/atomic_file.h"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "core/error.h"

namespace bitfall {

AtomicFile::AtomicFile(std::filesystem::path path)
    : path_(std::move(path)), temporary_(concat(path_.string(), ".tmp-", ::getpid())) {
  descriptor_ = ::open(temporary_.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
  if (descriptor_ < 0) fail("cannot create");
}

AtomicFile::~AtomicFile() {
  if (descriptor_ >= 0) ::close(descriptor_);
  if (!temporary_.empty()) ::unlink(temporary_.c_str());
}

void AtomicFile::write(std::span<const std::byte> bytes) {
  while (!bytes.empty()) {
    const ssize_t written = ::write(descriptor_, bytes.data(), bytes.size());
    if (written < 0) {
      if (errno == EINTR) continue;
      fail("cannot write");
    }
    bytes = bytes.subspan(static_cast<std::size_t>(written));
  }
}

void AtomicFile::commit() {
  if (::fsync(descriptor_) != 0) fail("cannot write");
  const int closed = ::close(descriptor_);
  descriptor_ = -1;
  if (closed != 0) fail("cannot write");
  if (::rename(temporary_.c_str(), path_.c_str()) != 0) fail("cannot rename the finished file to");
  temporary_.clear();

  // The rename itself must survive a power cut. Some file systems cannot sync a folder (EINVAL).
  const auto folder = path_.has_parent_path() ? path_.parent_path() : std::filesystem::path(".");
  const int folder_descriptor = ::open(folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (folder_descriptor < 0) fail("cannot open the folder of");
  const int synced = ::fsync(folder_descriptor);
  const int reason = errno;
  ::close(folder_descriptor);
  errno = reason;
  if (synced != 0 && reason != EINVAL) fail("cannot sync the folder of");
}

void AtomicFile::fail(const char* action) const {
  const int reason = errno;
  throw ModelFileError(concat(action, " '", path_.string(), "': ", std::strerror(reason),
                              reason == ENOSPC ? "; free some disk space and try again" : ""));
}

}  // namespace bitfall
