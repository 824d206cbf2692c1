// Heads: what stands on the encoder and gives the loss. Classification and regression read the
// pooled first token of each sequence, spans (question answering) read every token. A head may also
// be absent: the encoder's output is then the model's, and the loss the caller's.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string_view>
#include <vector>

#include "core/parameter_store.h"
#include "engine/encoder_config.h"
#include "engine/encoder_pass.h"
#include "engine/workspace.h"

namespace bitfall {

enum class HeadType { classification, regression, span };

/// Throws ConfigError that lists the names for anything but "classification", "regression" and
/// "span".
HeadType parse_head_type(std::string_view name);

struct HeadConfig {
  HeadType type = HeadType::classification;
  std::int64_t num_labels = 2;  ///< 1 for regression, 2 (start and end) for spans
};

class Head {
 public:
  virtual ~Head() = default;

  virtual OutputRows rows() const = 0;
  /// In flat order.
  virtual std::vector<ParameterSpec> parameters() const = 0;
  /// Tensors parallel to parameters(); `gradients` may be empty if none will be computed.
  virtual void bind(std::span<const Tensor> weights, std::span<const Tensor> gradients) = 0;
  /// Throws ShapeError unless the labels of `batch`, if it has any, are of this head's kind, one
  /// (for spans one pair) per sequence, and within range.
  virtual void check_labels(const Batch& batch) const = 0;
  /// Takes the memory of one pass over `batch`, for which the encoder's output is `hidden` [R, H].
  virtual void plan(Workspace& workspace, DType compute_dtype, const EncoderBatch& batch,
                    const Tensor& hidden) = 0;
  /// hidden -> logits() and, if the batch has labels, loss(); `hidden` is read again by backward().
  virtual void forward(const EncoderPass& pass) = 0;
  /// scale * d loss / d logits; valid until the next plan(). Throws ShapeError if the batch had no
  /// labels.
  const Tensor& loss_gradient(const EncoderPass& pass, float scale);
  /// From d_logits, shaped as logits(): d_hidden [R, H], and the gradients of the head's weights
  /// unless `what` is input_only.
  virtual void backward(const EncoderPass& pass, const Tensor& d_logits, Differentiate what,
                        Accumulate accumulate, const Tensor& d_hidden) = 0;

  /// Tangent of d_hidden along hidden_tangent, [R, H] both, after loss_gradient() and backward() of
  /// the same pass in Mode::differentiate. d_hidden_tangent may be the memory of hidden_tangent.
  virtual void tangent(const EncoderPass& pass, float scale, const Tensor& hidden_tangent,
                       const Tensor& d_hidden_tangent) = 0;

  const Tensor& logits() const { return logits_; }  ///< [B, C], [T, 2] (spans) or [R, H] (none)
  const Tensor& loss() const { return loss_; }      ///< f32 [1], or empty without labels

 protected:
  /// d_logits_ = scale * d loss / d logits; only for a batch with labels.
  virtual void loss_backward(const EncoderPass& pass, float scale) = 0;

  Tensor logits_, d_logits_, loss_;
  Tensor logits_tangent_, d_logits_tangent_;
};

/// Throws ConfigError for a number of labels that the type cannot have.
std::unique_ptr<Head> make_head(const EncoderConfig& config, const HeadConfig& head);

/// No head: logits() is the encoder's output, [B, H] (first_token) or [T, H] (all_tokens).
std::unique_ptr<Head> make_absent_head(OutputRows rows);

}  // namespace bitfall
