#include "engine/factory.h"

#include <cstdlib>

#include "core/error.h"
#include "csrc_cpu/cpu_backend.h"
#include "csrc_cpu/cpu_isa.h"
#include "engine/encoder.h"
#include "engine/model_files.h"
#ifdef BITFALL_WITH_MPI
#include "csrc_cpu/mpi_communicator.h"
#endif

namespace bitfall {

std::unique_ptr<Backend> make_backend(const std::string& name) {
  check<BackendError>(name == "cpu", "backend '", name, "': this build has only 'cpu'");
  return std::make_unique<CpuBackend>();
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
                                    const CompletedConfig& config, Communicator& communicator) {
  const EncoderConfig encoder =
      parse_encoder_config(read_model_config(model_dir), (model_dir / "config.json").string());
  std::unique_ptr<Backend> backend = make_backend("cpu");
  auto model = std::make_unique<Encoder>(*backend, encoder, head);
  const auto load = [&](Backend& device, const ParameterStore& store) {
    load_model_weights(model_dir, encoder.initializer_range, config.config.seed, device, store);
  };
  return std::make_unique<Engine>(std::move(backend), std::move(model), communicator, config, load);
}

}  // namespace bitfall
