// The one place that knows which classes stand behind core's interfaces.
#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>

#include "core/backend.h"
#include "core/communicator.h"
#include "engine/engine.h"
#include "engine/heads.h"

namespace bitfall {

/// "cpu". Throws BackendError that lists the names for anything else.
std::unique_ptr<Backend> make_backend(const std::string& name);

/// Instruction set of the CPU kernels ("generic", "avx2", ...), as chosen at run time.
std::string cpu_isa();

/// MPI when mpirun started this process, otherwise a world of one. Throws CommunicationError if
/// mpirun started it and this build has no MPI.
std::unique_ptr<Communicator> make_communicator();

/// An engine for the BERT in `model_dir` (config.json and weights, as Hugging Face saves them) with
/// a head on it. `communicator` must outlive the engine.
///
/// Throws ModelFileError for the folder, ConfigError for a head or a config that does not fit.
std::unique_ptr<Engine> make_engine(const std::filesystem::path& model_dir, const HeadConfig& head,
                                    const CompletedConfig& config, Communicator& communicator);

}  // namespace bitfall
