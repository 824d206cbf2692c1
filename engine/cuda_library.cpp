#include "engine/cuda_library.h"

#include <dlfcn.h>

#include <cstdlib>
#include <filesystem>

#include "core/error.h"

namespace bitfall {
namespace {

namespace fs = std::filesystem;

constexpr const char* kFileName = "libbitfall_cuda.so";
constexpr const char* kVariable = "BITFALL_CUDA_LIBRARY";

/// The folder of the program or shared library that this code is part of.
fs::path own_folder() {
  Dl_info info{};
  std::error_code error;
  if (dladdr(reinterpret_cast<const void*>(&cuda_library), &info) != 0 &&
      info.dli_fname != nullptr) {
    const fs::path file = fs::canonical(info.dli_fname, error);
    if (!error) return file.parent_path();
  }
  return fs::canonical("/proc/self/exe", error).parent_path();
}

fs::path library_path() {
  const char* given = std::getenv(kVariable);
  return given != nullptr && *given != '\0' ? fs::path(given) : own_folder() / kFileName;
}

/// The library's plugin. Throws BackendError that says what is wrong with it.
const CudaPlugin& load(const fs::path& path) {
  std::error_code error;
  check<BackendError>(fs::exists(path, error), "no CUDA library at ", path.string(),
                      ": build bitfall where nvcc is (cmake -DBITFALL_CUDA=ON says what is "
                      "missing), or name the library in ",
                      kVariable);
  void* const library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    throw BackendError(concat(dlerror(),
                              ": the CUDA library does not load; install the runtime "
                              "libraries of its CUDA version (cuBLAS) or put their folder on "
                              "LD_LIBRARY_PATH"));
  }
  const auto entry = reinterpret_cast<CudaPluginEntry>(dlsym(library, kCudaPluginSymbol));
  const CudaPlugin* const plugin = entry == nullptr ? nullptr : entry(BITFALL_CUDA_INTERFACE);
  check<BackendError>(plugin != nullptr, path.string(),
                      " belongs to another build of bitfall: build and install both together");
  return *plugin;
}

}  // namespace

CudaLibrary open_cuda_library(const fs::path& path) {
  CudaLibrary found;
  try {
    found.plugin = &load(path);
    found.devices = found.plugin->devices();
    if (found.devices.empty()) {
      found.problem =
          "the NVIDIA driver shows no GPU to this process; see nvidia-smi and "
          "CUDA_VISIBLE_DEVICES";
    }
  } catch (const Error& error) {
    found.problem = error.what();
  }
  return found;
}

const CudaLibrary& cuda_library() {
  static const CudaLibrary library = open_cuda_library(library_path());
  return library;
}

}  // namespace bitfall
