// What the shared library bitfall_cuda offers to the program that loads it at run time.
//
// The program holds no symbol of CUDA, so it starts on machines without GPU, driver and CUDA
// libraries; engine/cuda_library.cpp opens this library when it is there.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "core/backend.h"
#include "core/communicator.h"

namespace bitfall {

struct CudaDevice {
  std::string name;
  int compute_major = 0, compute_minor = 0;  ///< compute capability
  std::size_t total_bytes = 0;
  std::string problem;  ///< why it cannot be used; empty if it can
};

class CudaPlugin {
 public:
  virtual ~CudaPlugin() = default;

  /// The GPUs that CUDA shows to this process. Throws BackendError if there is no driver, or one
  /// that is too old.
  virtual std::vector<CudaDevice> devices() const = 0;
  /// All operations go to `stream`, a cudaStream_t of this GPU that outlives the backend, or to a
  /// stream of its own. Throws BackendError if the GPU cannot be used.
  virtual std::unique_ptr<Backend> make_backend(int device_index,
                                                std::optional<std::uintptr_t> stream) const = 0;
  /// A communicator for tensors of `backend`, a Backend made here, between the ranks of `host`;
  /// it belongs to `backend`, and `host` must outlive both. NCCL where the library is there and
  /// every rank of a machine has a GPU of its own, otherwise copies through host memory; `notice`
  /// receives why, or nothing.
  virtual Communicator& connect(Backend& backend, Communicator& host,
                                std::string& notice) const = 0;
};

/// Name and type of the one symbol that the library exports. It returns null unless `interface` is
/// the BITFALL_CUDA_INTERFACE that the library was built with: two builds of core do not mix.
inline constexpr const char* kCudaPluginSymbol = "bitfall_cuda_plugin";
using CudaPluginEntry = const CudaPlugin* (*)(const char* interface);

}  // namespace bitfall
