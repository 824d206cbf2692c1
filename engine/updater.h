// Updater: all of a training step that comes after the gradients, for any model. It owns
// parameters, optimizer, loss scale, schedules and quantizer, and writes and reads the checkpoint
// of them all.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "core/backend.h"
#include "core/communicator.h"
#include "core/model.h"
#include "core/parameter_store.h"
#include "eigen_sched/bit_schedule.h"
#include "engine/checkpoint.h"
#include "engine/config.h"
#include "engine/eigenvalue_boundary.h"
#include "engine/gradient_reducer.h"
#include "engine/loss_scaler.h"
#include "engine/lr_schedule.h"
#include "engine/optimizer.h"
#include "engine/phase_timer.h"
#include "engine/slices.h"
#include "engine/step_result.h"
#include "quantizer/quantizer.h"

namespace bitfall {

/// Who turns gradients into new masters.
struct UpdateRule {
  /// schedule: Adam on default_groups(), at the rates of the config's scheduler. groups: Adam on
  /// `groups`, whose numbers the caller sets before each step. caller: what it gives to step().
  enum class Kind { schedule, groups, caller };
  Kind kind = Kind::schedule;
  std::vector<ParameterGroup> groups;
};

struct QuantizedSize {
  std::int64_t numel = 0;
  int bits = 32;  ///< 32 for a parameter that is not quantized
  std::int64_t bytes_f32 = 0, bytes_quantized = 0;
};

/// Every rank constructs it with the same arguments and calls the same functions in the same order;
/// an exception on one rank must end all (Communicator::abort).
class Updater {
 public:
  using LoadWeights = bitfall::LoadWeights;
  /// Changes the masters by the gradients in the store, which are unscaled, clipped means then.
  using UpdateMasters = std::function<void()>;

  /// `backend` and `communicator` must outlive the object. Weights of rank 0 are broadcast. Throws
  /// ConfigError if the config does not fit the parameters (layer_name, layer_num, groups that do
  /// not divide).
  Updater(Backend& backend, Communicator& communicator, const CompletedConfig& config,
          const std::vector<ParameterSpec>& parameters, const LoadWeights& load_weights,
          UpdateRule rule = {});

  const Config& config() const { return config_.config; }
  const ParameterStore& store() const { return store_; }
  /// Null if nothing is quantized.
  const Quantizer* quantizer() const { return quantizer_.get(); }
  /// Null if the caller updates the masters.
  Optimizer* optimizer() { return optimizer_ ? &*optimizer_ : nullptr; }
  std::int64_t global_step() const { return state_.global_step; }      ///< updates so far
  std::int64_t skipped_steps() const { return state_.skipped_steps; }  ///< overflows so far
  /// What gradients must be multiplied by before they are summed into gradient_views().
  double loss_scale() const { return loss_scaler_.scale(); }
  /// States of the bit schedule, parallel to StepResult::bits; empty without quantization.
  std::vector<BitStateSpec> bit_states() const;
  /// True if the next step computes eigenvalues unless its gradients overflow.
  bool needs_eigenvalues() const;
  /// As in StepResult; the width of the compute dtype while quantization has not begun.
  std::vector<int> bits_per_state() const;

  /// Where this rank's gradients are written, per parameter; the same for the life of the object.
  /// At ZeRO stage 2 blocks share memory: see start_reduction().
  std::vector<Tensor> gradient_views() const { return reducer_.views(); }
  /// False: gradients of all micro-batches are summed in gradient_views(), and start_reduction() is
  /// called in the last one. True (ZeRO stage 2): it is called in every micro-batch, whose
  /// gradients overwrite what gradient_views() held; all ranks run as many.
  bool reduces_every_micro_batch() const { return reducer_.reduces_every_micro_batch(); }
  /// Starts the mean over ranks of the gradients of `block` (kNoBlock: of all parameters outside of
  /// blocks), which are complete on this rank. Every rank calls it for the blocks from the last to
  /// the first, then with kNoBlock, before step().
  ///
  /// Where every micro-batch is reduced, `accumulate` is no in the first one of a step, and blocks
  /// share memory: gradients of block b - 1 (b = 0: those outside of blocks) may be written after
  /// start_reduction(b) has returned, not before; those that lie behind the last block at any time.
  /// Throws ShapeError for another order.
  void start_reduction(int block, Accumulate accumulate = Accumulate::no) {
    reducer_.start(block, accumulate);
  }
  /// All calls of start_reduction() for a rank that has no sample of a micro-batch: zeros.
  void contribute_nothing(Accumulate accumulate);

  /// The step: waits for the reductions, then norm, clipping, eigenvalues, bit schedule, new
  /// masters and new working weights. The device decides by the norm whether it updates; the host
  /// waits for that decision when all is enqueued, or before eigenvalues and `update_masters`.
  ///
  /// `loss` [1] f32 on the device: this rank's share, of which the mean over ranks is the loss; it
  /// is overwritten by that mean. `make_hessian` is called if eigenvalues are due; its products are
  /// then this rank's share in the same sense. `update_masters` is called under UpdateRule::caller.
  ///
  /// An fp16 overflow skips the step: loss scale and counters move, weights and schedules do not.
  /// Throws TrainingError that names step and parameter if a gradient is not finite outside of
  /// fp16, or the loss scale is at its minimum; weights are then untouched.
  StepResult step(const Tensor& loss, const MakeHessian& make_hessian,
                  const UpdateMasters& update_masters = {});

  /// Flat f32 [numel]: the quantized weights exactly on their grid (masters where nothing is
  /// quantized), to be read only; valid until release_evaluation_weights(), master_weights() or
  /// load_checkpoint(). Collective the first time.
  Tensor evaluation_weights();
  /// Flat f32 [numel]: the masters of all ranks, to be read only; valid until evaluation_weights()
  /// or as that. Collective.
  Tensor master_weights();
  /// Frees the memory of evaluation_weights(), which is not needed while training.
  void release_evaluation_weights();

  /// What load_checkpoint() takes from a checkpoint beside weights, counters and bit schedule.
  struct LoadOptions {
    enum class Optimizer { restore, keep };  ///< moments and loss scale
    enum class Configs { equal, any };       ///< of the run that wrote it
    Optimizer optimizer = Optimizer::restore;
    Configs configs = Configs::equal;
  };

  /// Writes DIRECTORY/TAG and then DIRECTORY/latest (rank 0). Collective; throws CheckpointError on
  /// every rank if it failed on one.
  void save_checkpoint(const std::filesystem::path& directory, const std::string& tag,
                       const std::string& client_state,
                       std::span<const ClientTensor> client_tensors = {});
  /// Restores everything bit for bit and returns client_state. `tag` empty: the latest. Collective;
  /// throws CheckpointError on every rank if it failed on one, with nothing changed.
  std::string load_checkpoint(const std::filesystem::path& directory, const std::string& tag,
                              const LoadOptions& options);
  std::string load_checkpoint(const std::filesystem::path& directory, const std::string& tag) {
    return load_checkpoint(directory, tag, LoadOptions());
  }

  /// Name -> |quantized - master| / |master| (L2) of each quantized parameter. Collective.
  std::map<std::string, double> quantization_error();
  std::map<std::string, QuantizedSize> quantized_sizes() const;
  /// Memory of this rank's device by purpose.
  std::map<std::string, std::int64_t> memory_bytes() const;
  /// For the phases that the caller runs: "forward" and "backward".
  PhaseTimer& timer() { return timer_; }
  /// Seconds since the last call by phase: forward, backward, all_reduce (of what the backward pass
  /// did not hide, and with ZeRO the exchange of weights), update (masters and working weights),
  /// eigenvalues. A GPU works through what is enqueued: update waits for the gradients, the others
  /// do not.
  std::map<std::string, double> timings();

 private:
  /// What a step moves on the host before it knows whether it is skipped.
  struct Undo {
    std::int64_t optimizer_steps = 0;
    BitScheduleState bit_schedule;
  };
  Undo undo() const;
  /// Publishes the weights of before, which are a function of masters, schedule and step.
  void take_back(const Undo& undo, StepResult& result);
  /// Waits for the decision and takes loss and norm from it.
  bool is_skipped(StepResult& result);
  StepResult skip_step(StepResult result);
  std::vector<double> compute_eigenvalues(const MakeHessian& make_hessian, StepResult& result);
  /// New masters and new working weights.
  void update(const UpdateMasters& update_masters);
  /// How each of the store's owned parts is published at `step`; nothing where masters are working
  /// weights.
  std::vector<FakeQuantizeRange> published(std::int64_t step) const;
  void publish_weights(std::int64_t step);
  void gather_weights();
  [[noreturn]] void refuse_gradient(double loss) const;
  void check_ranks_agree_on_bits() const;
  CheckpointTensors checkpoint_tensors() const;
  enum class FlatContent { none, quantized, masters };
  Tensor flat_weights(FlatContent content);
  /// Throws CheckpointError on every rank if `error` is not empty on one.
  void agree(const std::string& error) const;

  Backend& backend_;
  Communicator& communicator_;
  CompletedConfig config_;
  ParameterStore store_;
  GradientReducer reducer_;
  Buffer decision_buffer_;
  Tensor decision_;                        ///< whether the step updates, in device memory
  std::optional<Optimizer> optimizer_;     ///< empty: the caller updates
  std::optional<LrSchedule> lr_schedule_;  ///< empty: the caller sets the rates
  LossScaler loss_scaler_;
  std::unique_ptr<BitSchedule> bit_schedule_;        ///< null without quantization
  std::unique_ptr<Quantizer> quantizer_;             ///< null without quantization
  std::unique_ptr<EigenvalueBoundary> eigenvalues_;  ///< null without quantization
  TrainingState state_;
  Buffer flat_buffer_;  ///< of evaluation_weights() and master_weights()
  FlatContent flat_content_ = FlatContent::none;
  PhaseTimer timer_;
};

}  // namespace bitfall
