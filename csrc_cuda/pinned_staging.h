// PinnedStaging: how small pieces of host memory get to the GPU without a wait of the host.
#pragma once

#include <array>
#include <cstddef>

#include "csrc_cuda/cuda_utils.h"

namespace bitfall {

/// From memory that is not pinned CUDA may copy only once the stream has come that far, and the
/// caller waits. Pieces go through pinned memory instead, in a few slots that take turns: the host
/// waits only if it is that many pieces ahead.
class PinnedStaging {
 public:
  static constexpr std::size_t kMostBytes = std::size_t{4} << 20;

  /// Copies `bytes` <= kMostBytes to the GPU in `stream`; `source` may change at once. Throws
  /// BackendError.
  void copy(const void* source, void* destination, std::size_t bytes, cudaStream_t stream);

 private:
  struct Slot {
    PinnedMemory<std::byte> memory;
    std::size_t bytes = 0;
    CudaEvent read;  ///< the GPU has read the last piece
  };
  std::array<Slot, 4> slots_;
  std::size_t next_ = 0;
};

}  // namespace bitfall
