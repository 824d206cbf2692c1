// The CUDA backend, which is a shared library of its own: looked for once, when first asked for.
#pragma once

#include <filesystem>
#include <string>
#include <vector>

#include "csrc_cuda/plugin.h"

namespace bitfall {

struct CudaLibrary {
  const CudaPlugin* plugin = nullptr;  ///< null if there is no usable library
  std::vector<CudaDevice> devices;
  /// Why no GPU can be used and what to do about it; empty if one can.
  std::string problem;
};

/// The library in the file `path`. Never throws for what it does not find.
CudaLibrary open_cuda_library(const std::filesystem::path& path);

/// Opens libbitfall_cuda.so once: where the environment variable BITFALL_CUDA_LIBRARY points, and
/// otherwise beside the program or Python module that holds this function.
const CudaLibrary& cuda_library();

}  // namespace bitfall
