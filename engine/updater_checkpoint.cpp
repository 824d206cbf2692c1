// Updater: checkpoints, the same on every rank.

#include "core/error.h"
#include "engine/updater.h"

namespace bitfall {

CheckpointTensors Updater::checkpoint_tensors() const {
  if (!optimizer_) return {store_.master(), {}};
  return {store_.master(), {optimizer_->exp_avg(), optimizer_->exp_avg_sq()}};
}

void Updater::agree(const std::string& error) const {
  const auto* text = reinterpret_cast<const std::byte*>(error.data());
  const std::vector<std::byte> mine(text, text + error.size());
  for (const std::vector<std::byte>& bytes : communicator_.all_gather(mine)) {
    if (bytes.empty()) continue;
    throw CheckpointError(std::string(reinterpret_cast<const char*>(bytes.data()), bytes.size()));
  }
}

void Updater::save_checkpoint(const std::filesystem::path& directory, const std::string& tag,
                              const std::string& client_state,
                              std::span<const ClientTensor> client_tensors) {
  std::string error;
  const CheckpointTensors tensors = checkpoint_tensors();
  std::vector<Tensor> slices = tensors.moments;
  slices.insert(slices.begin(), tensors.master);
  GatheredParameters values(backend_, communicator_, store_, slices);
  if (communicator_.rank() == 0) {
    TrainingState state = state_;
    if (optimizer_) state.optimizer_steps = optimizer_->steps();
    state.loss_scaler = loss_scaler_.state();
    if (bit_schedule_) state.bit_schedule = bit_schedule_->state();
    state.config = config_.json;
    state.client_state = client_state;
    try {
      bitfall::save_checkpoint(directory, tag, store_, values, state, client_tensors);
    } catch (const std::exception& failure) {
      error = failure.what();
    }
  }
  values.skip_rest();  // all of it where writing failed
  agree(error);
}

std::string Updater::load_checkpoint(const std::filesystem::path& directory, const std::string& tag,
                                     const LoadOptions& options) {
  const bool with_optimizer = options.optimizer == LoadOptions::Optimizer::restore;
  const bool any_config = options.configs == LoadOptions::Configs::any;
  CheckpointTensors tensors = checkpoint_tensors();
  if (!with_optimizer) tensors.moments.clear();
  std::string error;
  std::optional<LoadedCheckpoint> loaded;
  std::optional<BitSchedule> schedule;
  LossScaler scaler = loss_scaler_;
  try {
    loaded.emplace(directory, tag, store_, tensors, any_config ? "" : config_.json);
    if (with_optimizer) scaler.restore(loaded->state().loss_scaler);
    if (bit_schedule_) {
      schedule.emplace(*bit_schedule_);
      schedule->restore(loaded->state().bit_schedule);
    }
  } catch (const std::exception& failure) {
    error = failure.what();
  }
  agree(error);  // from here on nothing can fail for what the checkpoint holds

  loaded->read(backend_, store_, tensors);
  state_ = loaded->state();
  if (optimizer_ && with_optimizer) optimizer_->set_steps(state_.optimizer_steps);
  loss_scaler_ = scaler;
  if (schedule) bit_schedule_->restore(schedule->state());
  release_evaluation_weights();
  publish_weights(state_.global_step);
  communicator_.barrier();
  return state_.client_state;
}

}  // namespace bitfall
