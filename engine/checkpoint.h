// Checkpoints: DIRECTORY/TAG/{model.safetensors, optimizer.safetensors, state.json, checksums.json}
// and DIRECTORY/latest, which holds the tag as text, as in DeepSpeed.
//
// The folder is written under a temporary name and renamed when all of it is on the disk; only then
// `latest` changes. A kill at any moment leaves the last good checkpoint.
#pragma once

#include <cstdint>
#include <filesystem>
#include <span>
#include <string>
#include <vector>

#include "core/backend.h"
#include "core/parameter_store.h"
#include "eigen_sched/bit_schedule.h"
#include "engine/loss_scaler.h"
#include "engine/safetensors.h"
#include "engine/slices.h"

namespace bitfall {

/// What a run knows beside weights and moments.
struct TrainingState {
  std::int64_t global_step = 0;      ///< updates
  std::int64_t skipped_steps = 0;    ///< overflows
  std::int64_t boundaries = 0;       ///< accumulation boundaries, for gas_boundary_resolution
  std::int64_t optimizer_steps = 0;  ///< sets Adam's bias correction
  LossScalerState loss_scaler;
  BitScheduleState bit_schedule;
  std::string config;        ///< completed ds_config, JSON
  std::string client_state;  ///< JSON text of the caller
};

/// Flat f32 buffers that a checkpoint holds, parameter by parameter; of each this rank's slice.
struct CheckpointTensors {
  Tensor master;                ///< [owned().numel]
  std::vector<Tensor> moments;  ///< exp_avg and exp_avg_sq, likewise, or none
};

/// A tensor that a checkpoint keeps for the caller.
struct ClientTensor {
  SafetensorsInfo info;
  std::span<const std::byte> bytes;  ///< on the host
};

/// Writes the checkpoint; an older one of the same tag is replaced in one moment. `values` gives
/// masters, then moments if there are any. The files do not tell how ranks shared them.
///
/// Throws CheckpointError that names the path (an invalid tag, a full disk, no permission); what
/// was there before then stays.
void save_checkpoint(const std::filesystem::path& directory, const std::string& tag,
                     const ParameterStore& store, GatheredParameters& values,
                     const TrainingState& state, std::span<const ClientTensor> client_tensors = {});

/// What a checkpoint keeps for the caller.
struct ClientCheckpoint {
  std::string client_state;
  std::filesystem::path tensors;  ///< a file of safetensors; empty if there is none
};

/// Verified as by LoadedCheckpoint, but without a look at the model. Throws CheckpointError.
ClientCheckpoint read_client_checkpoint(const std::filesystem::path& directory,
                                        const std::string& tag);

/// A checkpoint that was verified and fits the model, not yet applied.
class LoadedCheckpoint {
 public:
  /// `tag` empty: the one that `latest` names. `tensors` are those that read() will fill. `config`
  /// is the run's completed ds_config; empty: any will do.
  ///
  /// Throws CheckpointError that names the file and what to do for: a missing or damaged file
  /// (sizes and CRC-32 are compared before anything is parsed), parameters of another model, and
  /// another config (the keys that differ are listed; those that only print may differ).
  LoadedCheckpoint(const std::filesystem::path& directory, const std::string& tag,
                   const ParameterStore& store, const CheckpointTensors& tensors,
                   const std::string& config);

  const TrainingState& state() const { return state_; }
  /// Copies this rank's slices of weights and moments to the device.
  void read(Backend& backend, const ParameterStore& store, const CheckpointTensors& tensors) const;

 private:
  std::filesystem::path folder_;
  TrainingState state_;
};

}  // namespace bitfall
