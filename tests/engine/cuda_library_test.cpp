#include "engine/cuda_library.h"

#include <dlfcn.h>
#include <gmock/gmock.h>
#include <gnu/libc-version.h>
#include <gtest/gtest.h>

#include <cstdlib>
#include <fstream>

#include "core/error.h"
#include "engine/factory.h"
#include "tests/support/temporary_folder.h"

namespace bitfall::test {
namespace {

using testing::HasSubstr;

TEST(CudaLibrary, AMissingFileIsNamedWithWhatToDo) {
  const CudaLibrary library = open_cuda_library("/nowhere/libbitfall_cuda.so");
  EXPECT_EQ(library.plugin, nullptr);
  EXPECT_THAT(library.problem, HasSubstr("/nowhere/libbitfall_cuda.so"));
  EXPECT_THAT(library.problem, HasSubstr("BITFALL_CUDA=ON"));
}

TEST(CudaLibrary, AFileThatIsNoLibraryIsRefused) {
  const TemporaryFolder folder;
  const auto path = folder.path() / "libbitfall_cuda.so";
  std::ofstream(path) << "not a library";
  const CudaLibrary library = open_cuda_library(path);
  EXPECT_EQ(library.plugin, nullptr);
  EXPECT_THAT(library.problem, HasSubstr("does not load"));
}

TEST(CudaLibrary, AnotherLibraryIsRefused) {
  Dl_info info{};
  ASSERT_NE(dladdr(reinterpret_cast<const void*>(&gnu_get_libc_version), &info), 0);
  const CudaLibrary library = open_cuda_library(info.dli_fname);
  EXPECT_EQ(library.plugin, nullptr);
  EXPECT_THAT(library.problem, HasSubstr("another build"));
}

/// With the library of this build, there is a GPU or a reason why not.
TEST(CudaLibrary, TheOneOfThisBuildOpens) {
  const char* path = std::getenv("BITFALL_CUDA_LIBRARY");
  if (path == nullptr) GTEST_SKIP() << "built without CUDA";
  const CudaLibrary library = open_cuda_library(path);
  ASSERT_NE(library.plugin, nullptr) << library.problem;
  EXPECT_EQ(library.devices.empty(), !library.problem.empty()) << library.problem;
  EXPECT_THAT(library.problem, testing::AnyOf("", HasSubstr("driver")));
}

TEST(DeviceChoice, FollowsWhatIsThere) {
  const CudaLibrary& cuda = cuda_library();
  const bool has_gpu = cuda.problem.empty() && cuda.devices.front().problem.empty();
  EXPECT_EQ(choose_device("cpu").device, "cpu");
  EXPECT_EQ(choose_device("auto").device, has_gpu ? "cuda" : "cpu");
  EXPECT_FALSE(choose_device("auto").reason.empty());
  EXPECT_THROW(choose_device("gpu"), ConfigError);
  EXPECT_THROW(make_backend("gpu"), BackendError);
  if (has_gpu) {
    EXPECT_EQ(choose_device("cuda").device, "cuda");
    EXPECT_EQ(make_backend("cuda")->device(), Device::cuda);
    EXPECT_THROW(make_backend("cuda", static_cast<int>(cuda.devices.size())), BackendError);
  } else {
    EXPECT_THROW(choose_device("cuda"), BackendError);
    EXPECT_THROW(make_backend("cuda"), BackendError);
  }
}

}  // namespace
}  // namespace bitfall::test
