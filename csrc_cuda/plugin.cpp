#include "csrc_cuda/plugin.h"

#include <algorithm>
#include <cstring>

#include "csrc_cuda/cuda_backend.h"
#include "csrc_cuda/staged_communicator.h"
#ifdef BITFALL_WITH_NCCL
#include "csrc_cuda/nccl_communicator.h"
#endif

namespace bitfall {
namespace {

constexpr int kOldestCompute = 8;  ///< major compute capability that the kernels are compiled for

bool nccl_is_there() {
#ifdef BITFALL_WITH_NCCL
  return nccl_library() != nullptr;
#else
  return false;
#endif
}

std::vector<std::byte> bytes_of(const void* data, std::size_t size) {
  std::vector<std::byte> bytes(size);
  std::memcpy(bytes.data(), data, size);
  return bytes;
}

/// Why NCCL cannot be used between these ranks, or nothing; the same answer on every rank.
std::string why_not_nccl(const CudaBackend& backend, Communicator& host) {
  const char there = nccl_is_there() ? 1 : 0;
  cudaDeviceProp properties{};
  cuda_check(cudaGetDeviceProperties(&properties, backend.device_index()),
             "cudaGetDeviceProperties");
  const auto uuid = bytes_of(&properties.uuid, sizeof(properties.uuid));
  const auto answers = host.all_gather(bytes_of(&there, 1));
  const auto uuids = host.all_gather(uuid);
  for (std::size_t rank = 0; rank < answers.size(); ++rank) {
    if (answers[rank].front() == std::byte{0})
      return concat("rank ", rank, " has no NCCL (libnccl.so.2)");
  }
  for (const std::vector<std::byte>& one : uuids) {
    if (std::count(uuids.begin(), uuids.end(), one) > 1) return "ranks share a GPU";
  }
  return {};
}

CudaDevice describe(int index) {
  cudaDeviceProp properties{};
  cuda_check(cudaGetDeviceProperties(&properties, index), "cudaGetDeviceProperties");
  CudaDevice device{
      properties.name, properties.major, properties.minor, properties.totalGlobalMem, {}};
  if (properties.major < kOldestCompute) {
    device.problem =
        concat("GPU ", index, " (", device.name, ") has compute capability ", device.compute_major,
               ".", device.compute_minor, ", expected ", kOldestCompute,
               ".0 or more: use --device cpu, or name another GPU in "
               "CUDA_VISIBLE_DEVICES");
  }
  return device;
}

class Plugin final : public CudaPlugin {
 public:
  std::vector<CudaDevice> devices() const override {
    int count = 0;
    const cudaError_t code = cudaGetDeviceCount(&count);
    if (code == cudaErrorNoDevice) return {};
    check<BackendError>(code == cudaSuccess, "no usable NVIDIA driver: ", cudaGetErrorString(code),
                        " (", cudaGetErrorName(code), "); this build needs a driver for CUDA ",
                        CUDART_VERSION / 1000);
    std::vector<CudaDevice> devices;
    devices.reserve(static_cast<std::size_t>(count));
    for (int index = 0; index < count; ++index) devices.push_back(describe(index));
    return devices;
  }

  std::unique_ptr<Backend> make_backend(int device_index,
                                        std::optional<std::uintptr_t> stream) const override {
    const std::vector<CudaDevice> all = devices();
    check<BackendError>(device_index >= 0 && static_cast<std::size_t>(device_index) < all.size(),
                        "GPU ", device_index, ": CUDA shows ", all.size(),
                        " to this process; see CUDA_VISIBLE_DEVICES");
    const CudaDevice& device = all[static_cast<std::size_t>(device_index)];
    check<BackendError>(device.problem.empty(), device.problem);
    return std::make_unique<CudaBackend>(device_index, stream);
  }

  Communicator& connect(Backend& backend, Communicator& host, std::string& notice) const override {
    auto& cuda = dynamic_cast<CudaBackend&>(backend);
    const std::string reason = why_not_nccl(cuda, host);
#ifdef BITFALL_WITH_NCCL
    if (reason.empty()) return cuda.adopt(std::make_unique<NcclCommunicator>(cuda, host));
#endif
    notice = concat("gradients travel through host memory and MPI: ", reason);
    return cuda.adopt(std::make_unique<StagedCommunicator>(cuda, host));
  }
};

}  // namespace
}  // namespace bitfall

extern "C" __attribute__((visibility("default"))) const bitfall::CudaPlugin* bitfall_cuda_plugin(
    const char* interface) {
  static const bitfall::Plugin plugin;
  return std::strcmp(interface, BITFALL_CUDA_INTERFACE) == 0 ? &plugin : nullptr;
}
