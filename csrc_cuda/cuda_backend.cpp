#include "csrc_cuda/cuda_backend.h"

#include <cstring>

#include "csrc_cuda/graph_recorder.h"
#include "csrc_cuda/matmul_plans.h"
#include "csrc_cuda/quantize_table.h"

namespace bitfall {
namespace {

int selected(int device_index) {
  cuda_check(cudaSetDevice(device_index), "cudaSetDevice");
  return device_index;
}

/// Free and total bytes of the GPU for a message; zeros if CUDA does not say.
struct MemoryInfo {
  std::size_t free_bytes = 0, total_bytes = 0;

  MemoryInfo() {
    if (cudaMemGetInfo(&free_bytes, &total_bytes) != cudaSuccess) free_bytes = total_bytes = 0;
  }
};

cudaMemcpyKind copy_kind(Device source, Device destination) {
  if (source == Device::cpu) return cudaMemcpyHostToDevice;
  return destination == Device::cpu ? cudaMemcpyDeviceToHost : cudaMemcpyDeviceToDevice;
}

}  // namespace

CudaBackend::CudaBackend(int device_index, std::optional<std::uintptr_t> stream)
    : device_index_(selected(device_index)),
      own_stream_(stream ? CudaStream() : make_stream()),
      // Python gives a stream as a number. NOLINTNEXTLINE(performance-no-int-to-ptr)
      stream_(stream ? reinterpret_cast<cudaStream_t>(*stream) : own_stream_.get()),
      host_numbers_(allocate_pinned<HostNumbers>(sizeof(HostNumbers))),
      decision_read_(make_event()),
      matmul_(std::make_unique<MatmulPlans>()),
      quantize_table_(std::make_unique<QuantizeTable>()) {}

CudaBackend::~CudaBackend() = default;

cudaStream_t CudaBackend::stream() const {
  // The current GPU belongs to a thread, and Python may call from any.
  cuda_check(cudaSetDevice(device_index_), "cudaSetDevice");
  return stream_;
}

Buffer CudaBackend::allocate(std::size_t bytes) {
  const cudaStream_t stream = this->stream();
  void* memory = nullptr;
  if (bytes > 0) {
    const cudaError_t code = cudaMalloc(&memory, bytes);
    if (code == cudaErrorMemoryAllocation) {
      cudaGetLastError();  // an allocation that failed leaves the GPU usable
      const MemoryInfo info;
      throw BackendError(concat("allocation of ", bytes, " bytes on GPU ", device_index_,
                                " failed: ", info.free_bytes, " of ", info.total_bytes,
                                " bytes are free. Lower --per_device_train_batch_size (raise "
                                "--gradient_accumulation_steps to keep the result) or "
                                "--max_seq_length, or end other programs on this GPU"));
    }
    cuda_check(code, "cudaMalloc");
  }
  // cudaFree waits for kernels that still use the memory.
  std::shared_ptr<void> owner(memory, [](void* owned) { cudaFree(owned); });
  if (bytes > 0) cuda_check(cudaMemsetAsync(memory, 0, bytes, stream), "cudaMemsetAsync");
  return {std::move(owner), bytes, Device::cuda};
}

void CudaBackend::copy(const Tensor& source, const Tensor& destination) {
  check<ShapeError>(source.numel() == destination.numel(), "copy: source has ", source.numel(),
                    " elements, destination ", destination.numel());
  check<UnsupportedError>(source.dtype == destination.dtype, "copy: source is ", name(source.dtype),
                          ", destination ", name(destination.dtype), "; cast converts");
  if (source.bytes() == 0) return;
  if (source.device == Device::cpu && destination.device == Device::cpu) {
    std::memmove(destination.data, source.data, source.bytes());
    return;
  }
  const cudaStream_t stream = this->stream();
  if (source.device == Device::cpu && source.bytes() <= PinnedStaging::kMostBytes) {
    return staging_.copy(source.data, destination.data, source.bytes(), stream);
  }
  const cudaMemcpyKind kind = copy_kind(source.device, destination.device);
  cuda_check(cudaMemcpyAsync(destination.data, source.data, source.bytes(), kind, stream),
             "cudaMemcpyAsync");
  // The source, too, may change at once: a GPU that reads pageable memory itself need not have yet.
  if (kind != cudaMemcpyDeviceToDevice)
    cuda_check(cudaStreamSynchronize(stream), "cudaStreamSynchronize");
}

void CudaBackend::synchronize() {
  cuda_check(cudaStreamSynchronize(stream()), "cudaStreamSynchronize");
}

void CudaBackend::fill_zero(const Tensor& destination) {
  if (destination.bytes() == 0) return;
  cuda_check(cudaMemsetAsync(device_data<void>(destination), 0, destination.bytes(), stream()),
             "cudaMemsetAsync");
}

std::unique_ptr<Recorder> CudaBackend::make_recorder() {
  // The default stream, on which PyTorch works, cannot be recorded.
  if (stream_ == nullptr) return Backend::make_recorder();
  return std::make_unique<GraphRecorder>(*this);
}

Communicator& CudaBackend::adopt(std::unique_ptr<Communicator> communicator) {
  communicator_ = std::move(communicator);
  return *communicator_;
}

void* CudaBackend::scratch(std::size_t bytes) {
  if (scratch_.bytes() < bytes) {
    scratch_ = Buffer();  // first give the old memory back
    scratch_ = allocate(bytes);
  }
  return scratch_.memory().get();
}

}  // namespace bitfall
