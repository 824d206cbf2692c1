// Model: what is trained. Batch: what it is trained on. And the two hooks through which other tools
// (quantization, pruning, calibration) take part in a step.
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <string_view>
#include <vector>

#include "core/backend.h"
#include "core/parameter_store.h"

namespace bitfall {

/// A packed micro-batch on the host: token rows of all sequences back to back, no padding.
struct Batch {
  std::vector<std::int32_t> input_ids;        ///< [T]
  std::vector<std::int32_t> token_type_ids;   ///< [T], or empty for all zeros
  std::vector<std::int32_t> position_ids;     ///< [T], or empty for 0, 1, ... in each sequence
  std::vector<std::int32_t> sequence_starts;  ///< [B+1], first 0, last T, strictly increasing
  /// [B] how many of its first tokens each sequence attends to, or empty for all: what follows is
  /// padding whose output is wanted nevertheless.
  std::vector<std::int32_t> key_lengths;
  std::vector<std::int32_t> sample_keys;   ///< [B] identity of each sample in its step, for dropout
  std::vector<std::int32_t> class_labels;  ///< [B], classification; empty without labels
  std::vector<float> regression_labels;    ///< [B], regression
  std::vector<std::int32_t> span_positions;  ///< [B, 2] start and end token within the sequence

  std::int64_t num_tokens() const { return static_cast<std::int64_t>(input_ids.size()); }
  std::int64_t num_sequences() const {
    return static_cast<std::int64_t>(sequence_starts.size()) - 1;
  }
};

/// train: dropout on, activations kept. differentiate: dropout off, activations kept. evaluate:
/// dropout off, nothing kept.
enum class Mode { train, differentiate, evaluate };

struct ForwardContext {
  Mode mode = Mode::evaluate;
  std::uint64_t seed = 0;  ///< of every dropout
  std::uint32_t step = 0;  ///< optimizer step, keys dropout
};

/// Called during the backward pass when the gradients of a block are complete (kNoBlock: at its
/// very end, all others).
using BlockReady = std::function<void(int block)>;

class Model {
 public:
  virtual ~Model() = default;

  /// Layout in flat order; constant for the life of the model.
  virtual const std::vector<ParameterSpec>& parameters() const = 0;
  /// Weights (one dtype, which becomes the compute dtype) and f32 gradients, parallel to
  /// parameters(). The memory must outlive the next bind.
  virtual void bind(std::span<const Tensor> weights, std::span<const Tensor> gradients) = 0;

  /// Runs `batch`; loss() and logits() are valid afterwards. Throws ShapeError for a malformed
  /// batch (ids outside the vocabulary, sequences beyond max_position_embeddings, labels outside
  /// the classes).
  virtual void forward(const Batch& batch, const ForwardContext& context) = 0;
  /// f32 [1] on the device: mean loss of the last forward; empty if the batch had no labels.
  virtual Tensor loss() const = 0;
  /// What the model puts out, compute dtype: [B, C], [T, 2] for spans, or the encoder's output
  /// itself, [B, H] or [T, H].
  virtual Tensor logits() const = 0;
  /// gradients (+)= scale * d loss / d weights of the last forward(train or differentiate). Once
  /// per forward: activations may be overwritten on the way.
  virtual void backward(float scale, Accumulate accumulate, const BlockReady& on_block_ready) = 0;
  /// The same for a loss that the caller has computed from logits(): `d_logits` is its gradient, of
  /// the shape and dtype of logits(). The batch needs no labels.
  virtual void backward_from(const Tensor& d_logits, Accumulate accumulate,
                             const BlockReady& on_block_ready) = 0;

  /// Runs `batch` forward and backward in Mode::differentiate and keeps what hessian_product reads,
  /// until the next bind, forward or prepare_hessian. Needs labels, no gradients.
  virtual void prepare_hessian(const Batch& batch, float scale) = 0;
  /// product = H direction, with H the second derivative of scale * loss by the parameters of
  /// `block`, exact. Both are parallel to those parameters and adjacent where they are; `direction`
  /// in the compute dtype, `product` f32.
  virtual void hessian_product(int block, std::span<const Tensor> direction,
                               std::span<const Tensor> product) = 0;
};

/// Rewrites the working weights after each optimizer step (quantizer, pruning masks), in
/// registration order.
class WeightTransform {
 public:
  virtual ~WeightTransform() = default;
  /// `step` counts optimizer steps that were not skipped, 1 for the first.
  virtual void publish(Backend& backend, ParameterStore& store, std::int64_t step) = 0;
};

}  // namespace bitfall
