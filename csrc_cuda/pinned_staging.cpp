#include "csrc_cuda/pinned_staging.h"

#include <cstring>

namespace bitfall {

void PinnedStaging::copy(const void* source, void* destination, std::size_t bytes,
                         cudaStream_t stream) {
  Slot& slot = slots_[next_];
  next_ = (next_ + 1) % slots_.size();
  if (!slot.read) slot.read = make_event();
  cuda_check(cudaEventSynchronize(slot.read.get()), "cudaEventSynchronize");
  if (slot.bytes < bytes) {
    slot.bytes = 0;
    slot.memory = allocate_pinned<std::byte>(bytes);
    slot.bytes = bytes;
  }
  std::memcpy(slot.memory.get(), source, bytes);
  cuda_check(cudaMemcpyAsync(destination, slot.memory.get(), bytes, cudaMemcpyHostToDevice, stream),
             "cudaMemcpyAsync");
  cuda_check(cudaEventRecord(slot.read.get(), stream), "cudaEventRecord");
}

}  // namespace bitfall
