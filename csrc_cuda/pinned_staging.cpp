#include "csrc_cuda/pinned_staging.h"

#include <cstring>

namespace bitfall {

void PinnedStaging::grow(Slot& slot, std::size_t bytes) {
  slot.bytes = 0;
  slot.on_host = allocate_pinned<std::byte>(bytes);
  void* memory = nullptr;
  cuda_check(cudaMalloc(&memory, bytes), "cudaMalloc");
  slot.on_gpu.reset(memory);
  slot.bytes = bytes;
}

void PinnedStaging::copy(const void* source, void* destination, std::size_t bytes,
                         cudaStream_t stream) {
  if (!stream_) stream_ = make_stream();
  Slot& slot = slots_[next_];
  next_ = (next_ + 1) % slots_.size();
  if (!slot.arrived) slot.arrived = make_event();
  if (!slot.read) slot.read = make_event();
  cuda_check(cudaEventSynchronize(slot.read.get()), "cudaEventSynchronize");
  if (slot.bytes < bytes) grow(slot, bytes);
  std::memcpy(slot.on_host.get(), source, bytes);
  const auto move = [bytes](void* to, const void* from, cudaMemcpyKind kind, cudaStream_t on,
                            const CudaEvent& done) {
    cuda_check(cudaMemcpyAsync(to, from, bytes, kind, on), "cudaMemcpyAsync");
    cuda_check(cudaEventRecord(done.get(), on), "cudaEventRecord");
  };
  move(slot.on_gpu.get(), slot.on_host.get(), cudaMemcpyHostToDevice, stream_.get(), slot.arrived);
  cuda_check(cudaStreamWaitEvent(stream, slot.arrived.get(), 0), "cudaStreamWaitEvent");
  move(destination, slot.on_gpu.get(), cudaMemcpyDeviceToDevice, stream, slot.read);
}

}  // namespace bitfall
