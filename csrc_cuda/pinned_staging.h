// PinnedStaging: how small pieces of host memory get to the GPU without a wait of the host.
#pragma once

#include <array>
#include <cstddef>

#include "csrc_cuda/cuda_utils.h"

namespace bitfall {

/// From memory that is not pinned CUDA may copy only once the stream has come that far, and the
/// caller waits. Pieces go through pinned memory instead, and on a stream of their own to the GPU,
/// while it still works on what came before; the stream of their destination takes them from there.
/// They do so in a few slots in turn: the host waits only if it is that many pieces ahead.
class PinnedStaging {
 public:
  static constexpr std::size_t kMostBytes = std::size_t{4} << 20;

  /// Copies `bytes` <= kMostBytes to the GPU in `stream`; `source` may change at once. Throws
  /// BackendError.
  void copy(const void* source, void* destination, std::size_t bytes, cudaStream_t stream);

 private:
  struct Slot {
    PinnedMemory<std::byte> on_host;
    DeviceMemory on_gpu;
    std::size_t bytes = 0;
    CudaEvent arrived;  ///< the last piece is on the GPU
    CudaEvent read;     ///< the last piece has been taken
  };
  void grow(Slot& slot, std::size_t bytes);

  CudaStream stream_;
  std::array<Slot, 4> slots_;
  std::size_t next_ = 0;
};

}  // namespace bitfall
