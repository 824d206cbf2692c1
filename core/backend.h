// Backend: the operations a device must provide, as forward/backward pairs on Tensors.
//
// Rules for every operation:
//  - the caller allocates outputs; an operation never keeps a pointer after it returns;
//  - operations of one backend run in call order; only `synchronize`, `copy` to the host and
//  functions
//    that return a number wait for them;
//  - "compute dtype" below is f32, bf16 or f16 and is the same for all tensors so marked in one
//  call;
//    sums, statistics and transcendental functions are computed in f32 whatever the compute dtype;
//  - gradients of parameters are f32 and follow `Accumulate`; gradients of activations are in the
//    compute dtype and overwrite unless the operation takes an `Accumulate`;
//  - a size or dtype that a device cannot do throws UnsupportedError naming operation, device and
//  dtype;
//    shapes that do not fit throw ShapeError; results are reproducible run to run (fixed order of
//    sums).
//
// The tangent of a quantity q, written q_tangent, is its derivative along a direction in the space
// of weights: R{q} of Pearlmutter 1994, "Fast exact multiplication by the Hessian". An operation
// whose name ends in _tangent computes the tangent of its namesake's result from those of its
// arguments, without dropout: the products it serves are taken without.
//
// Shape letters: T tokens of a packed batch, B sequences, R rows, H hidden_size, A attention heads,
// D head size (H = A * D), F feed-forward size, K inputs and N outputs of a linear layer, C
// classes, V vocabulary, G quantization groups.
#pragma once

#include <cstdint>
#include <memory>
#include <span>

#include "core/quant_spec.h"
#include "core/recorder.h"
#include "core/rng.h"
#include "core/tensor.h"
#include "core/update_decision.h"

namespace bitfall {

enum class Accumulate { no, yes };  ///< overwrite the destination, or add to it

/// gelu: exact, x Phi(x). gelu_tanh: the tanh approximation ("gelu_new").
enum class Activation { gelu, gelu_tanh, relu, tanh };

struct AttentionShape {
  std::int64_t num_attention_heads = 1;
  std::int64_t head_size = 64;
  /// [B] s32 (host readable on CPU): 1..length, how many of its first tokens a sequence attends to,
  /// or empty for all. The others are padding whose own output is wanted.
  Tensor key_lengths = {};
};

/// What attention's forward pass read and left, and the tangents of it.
struct AttentionTangents {
  Tensor qkv, qkv_tangent;                  ///< [T, 3H] compute dtype
  Tensor out, out_tangent;                  ///< [T, H] compute dtype
  Tensor log_sum_exp, log_sum_exp_tangent;  ///< [T, A] f32
};

/// y = dropout_out(norm(dropout_in(x) + residual)), norm(s) = (s - mean) / sqrt(var + eps) * gamma
/// + beta.
struct LayerNormForward {
  Tensor x;            ///< [R, H] compute dtype
  Tensor residual;     ///< [R, H] compute dtype, or empty
  Tensor gamma, beta;  ///< [H] compute dtype
  Tensor row_keys;     ///< [R, 2] s32 {sample_key, position}; needed when a dropout is enabled
  Dropout input_dropout, output_dropout;
  float epsilon = 1e-12f;
  Tensor sum;  ///< out [R, H]: dropout_in(x) + residual; may be the memory of x; saved for backward
  Tensor mean_rstd;  ///< out [R, 2] f32: mean and 1 / sqrt(var + eps); saved for backward
  Tensor y;          ///< out [R, H] compute dtype
};

struct LayerNormBackward {
  Tensor dy;                              ///< [R, H] compute dtype
  Tensor sum, mean_rstd;                  ///< as saved by the forward pass
  Tensor gamma;                           ///< [H] compute dtype
  Tensor row_keys;                        ///< [R, 2] s32
  Dropout input_dropout, output_dropout;  ///< as in the forward pass
  Tensor dresidual;  ///< out [R, H]: gradient of `sum`; may be the memory of dy
  Tensor dx;  ///< out [R, H]: dropout mask applied to dresidual; empty when input_dropout is off
  Tensor dgamma, dbeta;                    ///< out [H] f32
  Accumulate accumulate = Accumulate::no;  ///< for dgamma and dbeta
};

/// Tangent of LayerNormForward's y, from those of sum, gamma and beta. Compute dtype unless noted.
struct LayerNormForwardTangent {
  Tensor sum, mean_rstd;               ///< as saved by the forward pass: [R, H], [R, 2] f32
  Tensor gamma;                        ///< [H]
  Tensor sum_tangent;                  ///< [R, H]
  Tensor gamma_tangent, beta_tangent;  ///< [H] each, or both empty: zero
  Tensor y_tangent;                    ///< out [R, H]; may be the memory of sum_tangent
};

/// Tangents of LayerNormBackward's dresidual (here dsum), dgamma and dbeta.
struct LayerNormBackwardTangent {
  Tensor sum, mean_rstd;                 ///< as saved by the forward pass
  Tensor sum_tangent;                    ///< [R, H]
  Tensor gamma;                          ///< [H]
  Tensor gamma_tangent;                  ///< [H], or empty: zero
  Tensor dy, dy_tangent;                 ///< [R, H]: gradient of y and its tangent
  Tensor dsum_tangent;                   ///< out [R, H]; may be the memory of dy_tangent
  Tensor dgamma_tangent, dbeta_tangent;  ///< out [H] f32, overwritten; or both empty: not wanted
};

/// Rows of three tables, chosen per token.
struct EmbeddingTables {
  Tensor word;        ///< [V, H]
  Tensor position;    ///< [max_position_embeddings, H]
  Tensor token_type;  ///< [type_vocab_size, H]
};

struct EmbeddingIds {
  Tensor input_ids;       ///< [T] s32
  Tensor position_ids;    ///< [T] s32
  Tensor token_type_ids;  ///< [T] s32
};

/// One step of Adam (Kingma & Ba 2015) or AdamW (Loshchilov & Hutter 2019) with DeepSpeed's
/// FusedAdam rules.
struct AdamStep {
  float learning_rate = 0;
  float beta1 = 0.9f, beta2 = 0.999f, epsilon = 1e-8f;
  float bias_correction1 = 1;  ///< 1 - beta1^t, or 1 when bias_correction is off
  float bias_correction2 = 1;  ///< 1 - beta2^t, or 1 when bias_correction is off
  float weight_decay = 0;
  bool adam_w_mode = true;  ///< decoupled decay; otherwise decay is added to the gradient (L2)

  bool operator==(const AdamStep&) const = default;
};

/// A range of the flat buffers that is updated in one way: a parameter, or a part of one.
struct AdamRange {
  std::int64_t begin = 0, numel = 0;  ///< elements
  AdamStep step = {};
};

/// What Backend::adam_update works on: flat f32 buffers of one size, and the UpdateDecision of
/// decide_update.
struct AdamTensors {
  Tensor decision;
  Tensor gradient, master, exp_avg, exp_avg_sq;
};

/// A range of the flat buffers that is quantized in one way: a parameter, or a part of one.
struct FakeQuantizeRange {
  std::int64_t begin = 0, numel = 0;  ///< elements
  QuantSpec spec = {};                ///< groups: equal slices of the range
  StochasticKey key = {};             ///< read for stochastic rounding only
  float mix = 0;                      ///< share of the unquantized weight

  bool operator==(const FakeQuantizeRange&) const = default;
};

class Backend {
 public:
  virtual ~Backend() = default;

  // --- memory
  // -------------------------------------------------------------------------------------
  virtual Device device() const = 0;
  /// `bytes` of zeroed memory aligned to 64 bytes. Throws BackendError that names need and free
  /// bytes.
  virtual Buffer allocate(std::size_t bytes) = 0;
  /// Same dtype and size; either side may be on the host. Waits when the destination is on the
  /// host.
  virtual void copy(const Tensor& source, const Tensor& destination) = 0;
  virtual void synchronize() = 0;
  /// For operations of this backend, which must outlive it.
  virtual std::unique_ptr<Recorder> make_recorder() { return std::make_unique<Recorder>(); }
  virtual void fill_zero(const Tensor& destination) = 0;
  /// destination = source converted (round to nearest even), any pair of floating dtypes, same
  /// size.
  virtual void cast(const Tensor& source, const Tensor& destination) = 0;

  // --- linear layers
  // ------------------------------------------------------------------------------
  /// y [R, N] (+)= x [R, K] weight [N, K]^T + bias [N] (or empty). All compute dtype.
  virtual void linear_forward(const Tensor& x, const Tensor& weight, const Tensor& bias,
                              const Tensor& y, Accumulate accumulate) = 0;
  /// pre_activation [R, N] as above, y = activation(pre_activation). pre_activation is saved for
  /// backward.
  virtual void linear_activation_forward(const Tensor& x, const Tensor& weight, const Tensor& bias,
                                         Activation activation, const Tensor& pre_activation,
                                         const Tensor& y) = 0;
  /// dx [R, K] (+)= dy [R, N] weight [N, K]. All compute dtype.
  virtual void linear_backward_input(const Tensor& dy, const Tensor& weight, const Tensor& dx,
                                     Accumulate accumulate) = 0;
  /// dweight [N, K] f32 (+)= dy^T x, dbias [N] f32 (or empty) (+)= column sums of dy.
  virtual void linear_backward_weight(const Tensor& dy, const Tensor& x, const Tensor& dweight,
                                      const Tensor& dbias, Accumulate accumulate) = 0;
  /// dpre = dy * activation'(pre_activation); dpre may be the memory of dy. `y` (or empty) receives
  /// activation(pre_activation) again, so that the forward pass need not keep it; y may be the
  /// memory of pre_activation. All [R, N] compute dtype.
  virtual void activation_backward(Activation activation, const Tensor& pre_activation,
                                   const Tensor& dy, const Tensor& dpre, const Tensor& y) = 0;
  /// dpre_tangent = activation'(pre_activation) dy_tangent
  ///              + activation''(pre_activation) pre_activation_tangent dy,
  /// and may be the memory of dy_tangent. relu'' is 0. All [R, N] compute dtype.
  virtual void activation_backward_tangent(Activation activation, const Tensor& pre_activation,
                                           const Tensor& pre_activation_tangent, const Tensor& dy,
                                           const Tensor& dy_tangent,
                                           const Tensor& dpre_tangent) = 0;

  // --- attention
  // ----------------------------------------------------------------------------------
  /// out [T, H] = softmax(q k^T / sqrt(D)) v, sequence by sequence and head by head.
  ///
  /// qkv [T, 3H] compute dtype: columns [0, H) are q, [H, 2H) k, [2H, 3H) v, head a at a*D in each.
  /// sequence_starts [B+1] s32 (host readable on CPU), sample_keys [B] s32.
  /// log_sum_exp [T, A] f32 out: log of the softmax denominator of the scaled scores; saved for
  /// backward. Dropout acts on the probabilities; see Dropout for its keys.
  virtual void attention_forward(const AttentionShape& shape, const Tensor& qkv,
                                 const Tensor& sequence_starts, const Tensor& sample_keys,
                                 const Dropout& dropout, const Tensor& out,
                                 const Tensor& log_sum_exp) = 0;
  /// dqkv [T, 3H] out, from dout [T, H] and what the forward pass saved (qkv, out, log_sum_exp).
  virtual void attention_backward(const AttentionShape& shape, const Tensor& dout,
                                  const Tensor& qkv, const Tensor& out, const Tensor& log_sum_exp,
                                  const Tensor& sequence_starts, const Tensor& sample_keys,
                                  const Dropout& dropout, const Tensor& dqkv) = 0;
  /// Writes out_tangent and log_sum_exp_tangent of `tangents`, from the others.
  virtual void attention_forward_tangent(const AttentionShape& shape,
                                         const AttentionTangents& tangents,
                                         const Tensor& sequence_starts) = 0;
  /// dqkv_tangent [T, 3H] out, from dout, dout_tangent [T, H] and all of `tangents`.
  virtual void attention_backward_tangent(const AttentionShape& shape,
                                          const AttentionTangents& tangents, const Tensor& dout,
                                          const Tensor& dout_tangent, const Tensor& sequence_starts,
                                          const Tensor& dqkv_tangent) = 0;

  // --- norms, embeddings, rows
  // ----------------------------------------------------------------------
  virtual void layer_norm_forward(const LayerNormForward& args) = 0;
  virtual void layer_norm_backward(const LayerNormBackward& args) = 0;
  virtual void layer_norm_forward_tangent(const LayerNormForwardTangent& args) = 0;
  virtual void layer_norm_backward_tangent(const LayerNormBackwardTangent& args) = 0;
  /// y [T, H] = word[input_ids] + position[position_ids] + token_type[token_type_ids]. Ids were
  /// checked by the caller.
  virtual void embedding_forward(const EmbeddingIds& ids, const EmbeddingTables& tables,
                                 const Tensor& y) = 0;
  /// Adds dy [T, H] to the rows of the f32 gradient tables. Sums run in a fixed order: in that of
  /// the tokens on CPUs.
  virtual void embedding_backward(const EmbeddingIds& ids, const Tensor& dy,
                                  const EmbeddingTables& gradients) = 0;
  /// y [R, H] = x[row_index]. row_index [R] s32.
  virtual void gather_rows(const Tensor& x, const Tensor& row_index, const Tensor& y) = 0;
  /// dx = 0 except dx[row_index] = dy. The indices are distinct.
  virtual void scatter_rows(const Tensor& dy, const Tensor& row_index, const Tensor& dx) = 0;
  /// y = x * mask * scale; its backward is itself on the gradient. [R, H] compute dtype, may be in
  /// place.
  virtual void dropout(const Dropout& dropout, const Tensor& row_keys, const Tensor& x,
                       const Tensor& y) = 0;

  // --- losses: `loss` is f32 [1] on the device, a mean
  // ------------------------------------------------
  /// loss = mean_r -log softmax(logits)[r, labels[r]]. logits [R, C] compute dtype, labels [R] s32.
  virtual void cross_entropy_forward(const Tensor& logits, const Tensor& labels,
                                     const Tensor& loss) = 0;
  /// dlogits [R, C] = scale * d loss / d logits.
  virtual void cross_entropy_backward(const Tensor& logits, const Tensor& labels, float scale,
                                      const Tensor& dlogits) = 0;
  /// dlogits_tangent [R, C] = scale / R * (diag(p) - p p^T) logits_tangent, p = softmax(logits) of
  /// a row, whatever the labels.
  virtual void cross_entropy_backward_tangent(const Tensor& logits, const Tensor& logits_tangent,
                                              float scale, const Tensor& dlogits_tangent) = 0;
  /// loss = mean_r (predictions[r] - labels[r])^2. predictions [R, 1] compute dtype, labels [R]
  /// f32.
  virtual void mean_squared_error_forward(const Tensor& predictions, const Tensor& labels,
                                          const Tensor& loss) = 0;
  /// Linear in the predictions: its tangent is itself, of predictions_tangent and labels of zero.
  virtual void mean_squared_error_backward(const Tensor& predictions, const Tensor& labels,
                                           float scale, const Tensor& dpredictions) = 0;
  /// Extractive question answering: loss = mean over sequences of the mean of start and end
  /// cross-entropy, each a softmax over the tokens of the sequence. logits [T, 2] compute dtype,
  /// span_positions [B, 2] s32 within the sequence.
  virtual void span_cross_entropy_forward(const Tensor& logits, const Tensor& sequence_starts,
                                          const Tensor& span_positions, const Tensor& loss) = 0;
  virtual void span_cross_entropy_backward(const Tensor& logits, const Tensor& sequence_starts,
                                           const Tensor& span_positions, float scale,
                                           const Tensor& dlogits) = 0;
  /// dlogits_tangent [T, 2], as cross_entropy_backward_tangent.
  virtual void span_cross_entropy_backward_tangent(const Tensor& logits,
                                                   const Tensor& logits_tangent,
                                                   const Tensor& sequence_starts, float scale,
                                                   const Tensor& dlogits_tangent) = 0;

  // --- flat f32 vectors (parameters, gradients, Hessian products)
  // ---------------------------------------
  /// Sum of squares, accumulated in f64; NaN or infinity if any element is not finite.
  virtual double squared_sum(const Tensor& x) = 0;
  /// Writes decided_update() of `loss` [1] f32 and squared_sum(gradient) to `decision`, an
  /// UpdateDecision as s8 [sizeof(UpdateDecision)].
  virtual void decide_update(const Tensor& loss, const Tensor& gradient, const UpdateLimits& limits,
                             const Tensor& decision) = 0;
  /// The same for a squared norm that the host knows.
  virtual void decide_update(const Tensor& loss, double squared_norm, const UpdateLimits& limits,
                             const Tensor& decision) = 0;
  /// What the last decide_update has written; waits for that, not for operations behind it.
  virtual UpdateDecision last_decision() = 0;
  /// Inner product, accumulated in f64.
  virtual double dot(const Tensor& x, const Tensor& y) = 0;
  /// y = alpha * x + beta * y. With beta = 0, y is not read.
  virtual void axpby(float alpha, const Tensor& x, float beta, const Tensor& y) = 0;
  /// Updates master, exp_avg and exp_avg_sq from gradient * gradient_multiplier of the decision,
  /// range by range; leaves them alone if it says skip. The ranges are disjoint.
  ///
  /// Then fake_quantize(published, master, working), without a second pass over memory where the
  /// device can. `published` is empty, or has the begin and numel of each of `ranges`.
  virtual void adam_update(std::span<const AdamRange> ranges, const AdamTensors& tensors,
                           std::span<const FakeQuantizeRange> published, const Tensor& working) = 0;
  /// working (compute dtype) = mix * master + (1 - mix) * quantize(master), spec A5, range by
  /// range; bits >= 16 is a plain cast. master f32, working of the same size and perhaps its
  /// memory. The ranges are disjoint.
  virtual void fake_quantize(std::span<const FakeQuantizeRange> ranges, const Tensor& master,
                             const Tensor& working) = 0;
};

}  // namespace bitfall
