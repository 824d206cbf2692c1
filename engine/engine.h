// Engine: trains and evaluates one native Model. The step after the gradients is the Updater's. See
// docs/architecture.md for the order of events.
#pragma once

#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "core/backend.h"
#include "core/communicator.h"
#include "core/model.h"
#include "engine/updater.h"

namespace bitfall {

struct Evaluation {
  std::optional<double> loss;  ///< mean over the batch; empty without labels
  std::vector<float> logits;   ///< row-major
  Shape logits_shape;          ///< [B, C], or [T, 2] for spans
};

/// Trains one model. Every rank constructs it with the same arguments and calls the same functions
/// in the same order; an exception on one rank must end all (Communicator::abort).
class Engine {
 public:
  using LoadWeights = Updater::LoadWeights;

  /// `communicator` must outlive the engine. Otherwise as Updater's constructor.
  Engine(std::unique_ptr<Backend> backend, std::unique_ptr<Model> model, Communicator& communicator,
         const CompletedConfig& config, const LoadWeights& load_weights);

  /// What belongs to no forward or backward pass: weights, counters, schedules, checkpoints.
  Updater& updater() { return updater_; }
  const Updater& updater() const { return updater_; }
  Backend& backend() { return *backend_; }

  /// One optimizer step over up to gradient_accumulation_steps micro-batches of this rank: fewer,
  /// or smaller ones, at the end of an epoch, none if other ranks have some. Loss and gradient are
  /// the mean over the samples of all ranks.
  ///
  /// Throws ShapeError for too many micro-batches or a malformed one, and what Updater::step()
  /// throws.
  StepResult train_batch(std::span<const Batch> micro_batches);

  /// In f32, with Updater::evaluation_weights(). The first call after a step is collective.
  Evaluation evaluate(const Batch& batch);
  /// What the first call of evaluate() does beforehand, for a rank that may have no batch.
  void prepare_evaluation();

 private:
  /// What the model's weights are at the moment.
  enum class Binding { none, training, evaluation };

  const Config& config() const { return updater_.config(); }
  const ParameterStore& store() const { return updater_.store(); }
  void bind_training();
  void accumulate_gradients(std::span<const Batch> micro_batches);
  /// Adds `share` of its loss to loss_.
  void forward(const Batch& micro_batch, double share, Accumulate accumulate);
  /// Samples of the step on all ranks.
  double count_samples(std::span<const Batch> micro_batches);
  /// Backward passes of this step on each rank; where this rank has fewer micro-batches, the others
  /// get zeros from it.
  std::size_t count_rounds(std::size_t micro_batches);
  /// Overwrites loss_.
  float over_ranks(float value, ReduceOp op);

  Communicator& communicator_;
  std::unique_ptr<Backend> backend_;
  std::unique_ptr<Model> model_;
  Updater updater_;
  Buffer loss_buffer_;
  Tensor loss_;  ///< [1] f32, mean over this rank's micro-batches
  Binding binding_ = Binding::none;
  const void* evaluated_ = nullptr;  ///< weights bound for evaluation
};

}  // namespace bitfall
