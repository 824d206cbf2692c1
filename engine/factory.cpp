#include "engine/factory.h"

#include <cstdlib>
#include <iostream>
#include <string_view>

#include "core/error.h"
#include "csrc_cpu/cpu_backend.h"
#include "csrc_cpu/cpu_isa.h"
#include "engine/cuda_library.h"
#include "engine/encoder.h"
#include "engine/model_files.h"
#ifdef BITFALL_WITH_MPI
#include "csrc_cpu/mpi_communicator.h"
#endif

namespace bitfall {

namespace {

constexpr const char* kShareVariable = "BITFALL_SHARE_GPU";

/// The number of the GPU for this process.
int gpu_of(int local_rank, std::size_t count) {
  const char* share = std::getenv(kShareVariable);
  if (share != nullptr && std::string_view(share) == "1")
    return local_rank % static_cast<int>(count);
  check<BackendError>(static_cast<std::size_t>(local_rank) < count, "process ", local_rank,
                      " (from 0) of this machine has no GPU: ", count,
                      " are visible, and each process needs its own. Start at most ", count,
                      " per machine, or set ", kShareVariable,
                      "=1 to let processes share a GPU (slower: gradients then travel through "
                      "host memory), or if the launcher shows each process one of its own");
  return local_rank;
}

std::string describe(const CudaDevice& device) {
  return concat(device.name, " (compute capability ", device.compute_major, ".",
                device.compute_minor, ", ", device.total_bytes >> 30, " GiB)");
}

}  // namespace

Communicator& connect_devices(Backend& backend, Communicator& communicator) {
  if (backend.device() == Device::cpu || communicator.world_size() == 1) return communicator;
  std::string notice;
  Communicator& connected = cuda_library().plugin->connect(backend, communicator, notice);
  if (!notice.empty() && communicator.rank() == 0)
    std::cerr << concat("bitfall: ", notice, "\n") << std::flush;
  return connected;
}

std::unique_ptr<Backend> make_backend(const std::string& name, int local_rank,
                                      std::optional<std::uintptr_t> stream) {
  if (name == "cpu") return std::make_unique<CpuBackend>();
  check<BackendError>(name == "cuda", "backend '", name, "': expected 'cpu' or 'cuda'");
  const int index = gpu_index(local_rank);
  return cuda_library().plugin->make_backend(index, stream);
}

int gpu_index(int local_rank) {
  const CudaLibrary& cuda = cuda_library();
  check<BackendError>(cuda.problem.empty(), "device cuda: ", cuda.problem);
  return gpu_of(local_rank, cuda.devices.size());
}

DeviceChoice choose_device(const std::string& wanted) {
  check<ConfigError>(wanted == "auto" || wanted == "cpu" || wanted == "cuda", "device '", wanted,
                     "': expected 'auto', 'cpu' or 'cuda'");
  if (wanted == "cpu") return {"cpu", "as asked for"};
  const CudaLibrary& cuda = cuda_library();
  const std::string& problem = cuda.problem.empty() ? cuda.devices.front().problem : cuda.problem;
  if (problem.empty()) {
    return {"cuda", concat(cuda.devices.size(), cuda.devices.size() == 1 ? " GPU: " : " GPUs: ",
                           describe(cuda.devices.front()))};
  }
  check<BackendError>(wanted == "auto", "device cuda: ", problem);
  return {"cpu", problem};
}

std::string cpu_isa() { return std::string(name(choose_isa())); }

std::unique_ptr<Communicator> make_communicator() {
#ifdef BITFALL_WITH_MPI
  if (started_by_mpi()) return std::make_unique<MpiCommunicator>();
#else
  // Open MPI, then MPICH and its relatives. Without this check every rank would train alone.
  for (const char* variable : {"OMPI_COMM_WORLD_SIZE", "PMI_SIZE"}) {
    const char* size = std::getenv(variable);
    check<CommunicationError>(size == nullptr || std::string(size) == "1", "started by mpirun (",
                              variable, " = ", size == nullptr ? "" : size,
                              "), but built without MPI: install libopenmpi-dev and build again "
                              "with -DBITFALL_MPI=ON");
  }
#endif
  return std::make_unique<SingleProcess>();
}

std::unique_ptr<Engine> make_engine(const std::filesystem::path& model_dir, const HeadConfig& head,
                                    const CompletedConfig& config, Communicator& communicator,
                                    const std::string& device) {
  const EncoderConfig encoder =
      parse_encoder_config(read_model_config(model_dir), (model_dir / "config.json").string());
  std::unique_ptr<Backend> backend = make_backend(device, communicator.local_rank());
  Communicator& connected = connect_devices(*backend, communicator);
  auto model = std::make_unique<Encoder>(*backend, encoder, head);
  const auto load = [&](Backend& target, const ParameterStore& store) {
    load_model_weights(model_dir, encoder.initializer_range, config.config.seed, target, store);
  };
  return std::make_unique<Engine>(std::move(backend), std::move(model), connected, config, load);
}

}  // namespace bitfall
