// Engine: one training step, and everything a step needs. See docs/architecture.md for the order of
// events.
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
#include "engine/loss_scaler.h"
#include "engine/lr_schedule.h"
#include "engine/optimizer.h"
#include "engine/phase_timer.h"
#include "quantizer/quantizer.h"

namespace bitfall {

class EigenvalueBoundary;

struct EigenvalueResult {
  std::string name;
  int block = 0;
  int iterations = 0;  ///< of power iteration
  int products = 0;    ///< Hessian-vector products that they took
  bool converged = false;
  double value = 0;       ///< largest |eigenvalue|
  double normalized = 0;  ///< ev in [0, 1]
  int factor = 1;         ///< 1 + floor(4 ev)
};

struct StepResult {
  std::int64_t step = 0;
  double loss = 0;  ///< mean over the global batch
  double grad_norm = 0;
  double learning_rate = 0;
  double loss_scale = 1;
  bool skipped = false;
  std::vector<int> bits;  ///< per state of the schedule
  std::vector<BitDrop> drops;
  std::vector<EigenvalueResult> eigenvalues;
};

struct Evaluation {
  std::optional<double> loss;  ///< mean over the batch; empty without labels
  std::vector<float> logits;   ///< row-major
  Shape logits_shape;          ///< [B, C], or [T, 2] for spans
};

struct QuantizedSize {
  std::int64_t numel = 0;
  int bits = 32;  ///< 32 for a parameter that is not quantized
  std::int64_t bytes_f32 = 0, bytes_quantized = 0;
};

/// Trains one model. Every rank constructs it with the same arguments and calls the same functions
/// in the same order; an exception on one rank must end all (Communicator::abort).
class Engine {
 public:
  /// Fills the master weights of the store.
  using LoadWeights = std::function<void(Backend& backend, const ParameterStore& store)>;

  /// `communicator` must outlive the engine. Weights of rank 0 are broadcast. Throws ConfigError if
  /// the config does not fit the model (layer_name, layer_num, groups that do not divide).
  Engine(std::unique_ptr<Backend> backend, std::unique_ptr<Model> model, Communicator& communicator,
         const CompletedConfig& config, const LoadWeights& load_weights);
  ~Engine();

  const Config& config() const { return config_.config; }
  const ParameterStore& store() const { return store_; }
  Backend& backend() { return *backend_; }
  /// Null if nothing is quantized.
  const Quantizer* quantizer() const { return quantizer_.get(); }
  std::int64_t global_step() const { return state_.global_step; }      ///< updates so far
  std::int64_t skipped_steps() const { return state_.skipped_steps; }  ///< overflows so far
  /// States of the bit schedule, parallel to StepResult::bits; empty without quantization.
  std::vector<BitStateSpec> bit_states() const;
  /// As in StepResult; the width of the compute dtype while quantization has not begun.
  std::vector<int> bits_per_state() const;

  /// One optimizer step over up to gradient_accumulation_steps micro-batches of this rank: fewer,
  /// or smaller ones, at the end of an epoch, none if other ranks have some. Loss and gradient are
  /// the mean over the samples of all ranks.
  ///
  /// An fp16 overflow skips the step: loss scale and counters move, weights and schedules do not.
  /// Throws ShapeError for too many micro-batches or a malformed one, and TrainingError
  /// that names step and parameter if a gradient is not finite outside of fp16, or the loss scale
  /// is at its minimum; weights are then untouched.
  StepResult train_batch(std::span<const Batch> micro_batches);

  /// In f32, with the quantized weights exactly on their grid (masters where nothing is quantized).
  Evaluation evaluate(const Batch& batch);
  /// Flat f32 [numel] weights as evaluate() uses them, to be read only; valid until the next
  /// train_batch() or load_checkpoint().
  Tensor evaluation_weights();

  /// Writes DIRECTORY/TAG and then DIRECTORY/latest (rank 0). Collective; throws CheckpointError on
  /// every rank if it failed on one.
  void save_checkpoint(const std::filesystem::path& directory, const std::string& tag,
                       const std::string& client_state);
  /// Restores everything bit for bit and returns client_state. `tag` empty: the latest. Collective;
  /// throws CheckpointError on every rank if it failed on one, with nothing changed.
  std::string load_checkpoint(const std::filesystem::path& directory, const std::string& tag);

  /// Name -> |quantized - master| / |master| (L2) of each quantized parameter.
  std::map<std::string, double> quantization_error();
  std::map<std::string, QuantizedSize> quantized_sizes() const;
  /// Device memory by purpose.
  std::map<std::string, std::int64_t> memory_bytes() const;
  /// Seconds since the last call by phase: forward, backward, all_reduce, update, quantize,
  /// eigenvalues.
  std::map<std::string, double> timings();

 private:
  /// What the model's weights are at the moment.
  enum class Binding { none, training, evaluation };

  void broadcast_weights();
  void bind_training();
  double accumulate_gradients(std::span<const Batch> micro_batches);
  /// Samples of the step on all ranks.
  double count_samples(std::span<const Batch> micro_batches);
  /// Zeros of a rank without micro-batches, reduced in the order of a backward pass.
  void contribute_nothing();
  void start_reduction(int block);
  double gradient_norm();
  StepResult skip_step(StepResult result);
  std::vector<double> compute_eigenvalues(std::span<const Batch> micro_batches, StepResult& result);
  void update(StepResult& result);
  void publish_weights();
  [[noreturn]] void refuse_gradient(double loss) const;
  void check_ranks_agree_on_bits() const;
  CheckpointTensors checkpoint_tensors() const;
  /// Throws CheckpointError on every rank if `error` is not empty on one.
  void agree(const std::string& error) const;

  Communicator& communicator_;
  CompletedConfig config_;
  std::unique_ptr<Backend> backend_;
  std::unique_ptr<Model> model_;
  ParameterStore store_;
  Optimizer optimizer_;
  LossScaler loss_scaler_;
  LrSchedule lr_schedule_;
  std::unique_ptr<BitSchedule> bit_schedule_;  ///< null without quantization
  std::unique_ptr<Quantizer> quantizer_;       ///< null without quantization
  std::unique_ptr<EigenvalueBoundary> eigenvalues_;
  TrainingState state_;
  std::vector<FlatRange> unblocked_;  ///< what lies in no block
  Buffer loss_buffer_;
  Tensor loss_;  ///< [1] f32, mean over this rank's micro-batches
  Buffer evaluation_buffer_;
  Binding binding_ = Binding::none;
  PhaseTimer timer_;
};

}  // namespace bitfall
