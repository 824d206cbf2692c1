// The one place that knows which classes stand behind core's interfaces.
#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>

#include "core/backend.h"
#include "core/communicator.h"
#include "engine/engine.h"
#include "engine/heads.h"

namespace bitfall {

/// "cpu", or "cuda" for the GPU whose number is `local_rank` (the rank among the processes of this
/// machine). With the environment variable BITFALL_SHARE_GPU=1, ranks may outnumber the GPUs.
/// `stream`: a cudaStream_t that all operations on a GPU go to, in place of one of their own.
///
/// Throws BackendError that lists the names for anything else, or says why there is no GPU for this
/// process and what to do.
std::unique_ptr<Backend> make_backend(const std::string& name, int local_rank = 0,
                                      std::optional<std::uintptr_t> stream = {});

/// The number of the GPU that make_backend("cuda", local_rank) takes. Throws as that does.
int gpu_index(int local_rank);

/// What `wanted` ("auto", "cpu" or "cuda") comes to on this machine.
struct DeviceChoice {
  std::string device;  ///< "cpu" or "cuda"
  std::string reason;  ///< what was found, in words
};

/// Throws ConfigError for another name, BackendError for "cuda" unless the first GPU is usable.
DeviceChoice choose_device(const std::string& wanted);

/// Instruction set of the CPU kernels ("generic", "avx2", ...), as chosen at run time.
std::string cpu_isa();

/// MPI when mpirun started this process, otherwise a world of one. Throws CommunicationError if
/// mpirun started it and this build has no MPI.
std::unique_ptr<Communicator> make_communicator();

/// `communicator` where tensors of `backend` can go through it, otherwise one between the devices
/// that belongs to `backend`. All ranks together; `communicator` must outlive `backend`.
Communicator& connect_devices(Backend& backend, Communicator& communicator);

/// An engine for the BERT in `model_dir` (config.json and weights, as Hugging Face saves them) with
/// a head on it, on `device` ("cpu" or "cuda"). `communicator` must outlive the engine.
///
/// Throws BackendError if there is no such device, ModelFileError for the folder, ConfigError for a
/// head or a config that does not fit.
std::unique_ptr<Engine> make_engine(const std::filesystem::path& model_dir, const HeadConfig& head,
                                    const CompletedConfig& config, Communicator& communicator,
                                    const std::string& device = "cpu");

}  // namespace bitfall
