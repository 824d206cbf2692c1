// EncoderLayer: one BERT layer, forward and backward by hand over the backend's operations.
//
// Attention, its output projection, dropout + residual + LayerNorm, the feed-forward network,
// dropout + residual + LayerNorm. Where only the first token of each sequence is read afterwards
// (the last layer under a pooler), everything after attention runs on those B rows alone: the same
// numbers for a fraction of the work.
#pragma once

#include <functional>
#include <span>
#include <vector>

#include "core/parameter_store.h"
#include "engine/encoder_config.h"
#include "engine/encoder_pass.h"
#include "engine/workspace.h"

namespace bitfall {

/// What the forward pass keeps for the backward pass, compute dtype unless noted. Where nothing is
/// kept (Mode::evaluate), all layers share one set. What one cheap pass restores from these (the
/// first LayerNorm's output, the activation) is not kept.
struct LayerActivations {
  Tensor qkv;              ///< [T, 3H]
  Tensor context;          ///< [T, H], output of attention
  Tensor log_sum_exp;      ///< [T, A] f32
  Tensor context_rows;     ///< [R, H], memory of `context` when R = T
  Tensor attention_sum;    ///< [R, H], input of the first LayerNorm
  Tensor attention_stats;  ///< [R, 2] f32
  Tensor pre_activation;   ///< [R, F]
  Tensor output_sum;       ///< [R, H], input of the second LayerNorm
  Tensor output_stats;     ///< [R, 2] f32

  /// Takes the memory of one layer.
  static LayerActivations plan(Workspace& workspace, const EncoderConfig& config,
                               DType compute_dtype, const EncoderBatch& batch, OutputRows rows);
};

/// Gradients of what a layer computes on its way, in order of the backward pass, compute dtype. In
/// training they follow each other in the same memory; a Hessian product reads them all again.
struct LayerGradients {
  Tensor output;            ///< [R, H]
  Tensor output_sum;        ///< [R, H]
  Tensor activated;         ///< [R, F]
  Tensor pre_activation;    ///< [R, F]
  Tensor attention_output;  ///< [R, H]
  Tensor attention_sum;     ///< [R, H]
  Tensor context;           ///< [T, H]

  /// Memory that all layers use in turn.
  static LayerGradients in(const EncoderScratch& scratch, const EncoderConfig& config,
                           OutputRows rows);
  /// Memory of its own for all but pre_activation, which one cheap pass restores.
  static LayerGradients plan(Workspace& workspace, const EncoderScratch& scratch,
                             const EncoderConfig& config, DType compute_dtype,
                             const EncoderBatch& batch, OutputRows rows);
};

/// A layer in a Hessian product: gradients of the backward pass, and the tangents of what the
/// forward pass keeps (those of the norms' statistics are part of other operations).
struct LayerHessian {
  LayerGradients gradients;
  LayerActivations tangents;
};

using RestoreInput = std::function<void(const Tensor& input)>;

class EncoderLayer {
 public:
  EncoderLayer(const EncoderConfig& config, int index, OutputRows rows);

  /// Dropouts are numbered: 0 in the embeddings, then those of each layer, then the head's.
  static int first_free_dropout_site(std::int64_t num_layers);

  OutputRows rows() const { return rows_; }
  /// In flat order.
  std::vector<ParameterSpec> parameters() const;
  /// Tensors parallel to parameters(); `gradients` may be empty if none will be computed. Throws
  /// ShapeError unless query, key and value are adjacent in memory.
  void bind(std::span<const Tensor> weights, std::span<const Tensor> gradients);
  /// Memory of the passes to come: the layer's input [T, H], and what forward() keeps.
  void plan(const Tensor& input, const LayerActivations& activations);
  /// input -> output [R, H]; the activations are read again by backward(), and with the input by
  /// forward_tangent() and backward_tangent().
  void forward(const EncoderPass& pass, const Tensor& output);
  /// Gradients of the layer's weights and of its input, as far as `what` says.
  ///
  /// gradients.output in. With weights_and_input once per forward(): what that kept is overwritten.
  /// d_input [T, H] out; may be the memory of gradients.attention_sum when R = T. The layer's input
  /// is not kept: restore_input, which may use scratch.hidden, writes it again to where it is told;
  /// only the weights' gradients need it.
  void backward(const EncoderPass& pass, Differentiate what, Accumulate accumulate,
                const LayerGradients& gradients, const RestoreInput& restore_input,
                const Tensor& d_input);
  /// The layer's output [R, H] again, after forward() and before backward().
  void restore_output(const EncoderPass& pass, const Tensor& output) const;

  /// Tangent of the layer's output [R, H], and `hessian.tangents`, after forward() and backward()
  /// with input_only. Along `direction`, tensors parallel to parameters(), with the input held; or,
  /// if that is empty, along input_tangent [T, H] with the weights held.
  void forward_tangent(const EncoderPass& pass, const LayerHessian& hessian,
                       std::span<const Tensor> direction, const Tensor& input_tangent,
                       const Tensor& output_tangent);
  /// From the tangent of the output's gradient [R, H], which is overwritten, after
  /// forward_tangent(): `product`, the tangents of the gradients of parameters(), if `direction`
  /// is given again; otherwise d_input_tangent [T, H], which may be the memory of d_output_tangent
  /// when R = T.
  void backward_tangent(const EncoderPass& pass, const LayerHessian& hessian,
                        std::span<const Tensor> direction, std::span<const Tensor> product,
                        const Tensor& d_output_tangent, const Tensor& d_input_tangent);

 private:
  /// Weights (compute dtype) or gradients (f32). Query, key and value act as one matrix.
  struct Tensors {
    Tensor qkv_weight, qkv_bias;                    ///< [3H, H], [3H]
    Tensor attention_weight, attention_bias;        ///< [H, H], [H]
    Tensor attention_gamma, attention_beta;         ///< [H]
    Tensor intermediate_weight, intermediate_bias;  ///< [F, H], [F]
    Tensor output_weight, output_bias;              ///< [H, F], [H]
    Tensor output_gamma, output_beta;               ///< [H]
  };

  static Tensors group(std::span<const Tensor> tensors);
  AttentionShape attention_shape(const EncoderPass& pass) const {
    return {config_.num_attention_heads, config_.head_size(), pass.batch.key_lengths};
  }
  Dropout attention_probs_dropout(const EncoderPass& pass) const;
  Dropout attention_output_dropout(const EncoderPass& pass) const;
  Dropout output_dropout(const EncoderPass& pass) const;

  Tensor attention_forward(const EncoderPass& pass);
  /// The second LayerNorm, from norm.x, or over output_sum as it is.
  void output_norm(const EncoderPass& pass, LayerNormForward norm, const Tensor& output) const;
  /// The first LayerNorm over attention_sum as it is: writes attention_output [R, H] (scratch).
  Tensor attention_norm(const EncoderPass& pass, LayerNormForward norm) const;
  void feed_forward_forward(const EncoderPass& pass, const Tensor& attention_output,
                            const Tensor& output);
  void feed_forward_backward(const EncoderPass& pass, Differentiate what, Accumulate accumulate,
                             const LayerGradients& gradients);
  void attention_output_backward(const EncoderPass& pass, Differentiate what, Accumulate accumulate,
                                 const LayerGradients& gradients);
  void attention_backward(const EncoderPass& pass, Differentiate what, Accumulate accumulate,
                          const Tensor& d_context, const RestoreInput& restore_input,
                          const Tensor& d_input);

  /// Tangents of the weights and of their gradients: empty for a layer whose weights are held.
  struct Direction {
    Tensors weights, product;
    bool given() const { return static_cast<bool>(weights.qkv_weight); }
  };
  void attention_forward_tangent(const EncoderPass& pass, const LayerActivations& tangents,
                                 const Direction& direction, const Tensor& input_tangent);
  void feed_forward_forward_tangent(const EncoderPass& pass, const LayerActivations& tangents,
                                    const Direction& direction, const Tensor& output_tangent);
  void feed_forward_backward_tangent(const EncoderPass& pass, const LayerHessian& hessian,
                                     const Direction& direction, const Tensor& d_rows);
  void output_weight_tangent(const EncoderPass& pass, const LayerHessian& hessian,
                             const Direction& direction, const Tensor& d_output_sum_tangent);
  void intermediate_weight_tangent(const EncoderPass& pass, const LayerHessian& hessian,
                                   const Direction& direction,
                                   const Tensor& d_pre_activation_tangent, const Tensor& d_rows);
  void attention_output_backward_tangent(const EncoderPass& pass, const LayerHessian& hessian,
                                         const Direction& direction, const Tensor& d_rows,
                                         const Tensor& d_context_rows);
  void attention_backward_tangent(const EncoderPass& pass, const LayerHessian& hessian,
                                  const Direction& direction, const Tensor& d_context_tangent,
                                  const Tensor& d_input_tangent);
  AttentionTangents attention_tangents(const LayerActivations& tangents) const;
  /// Tangent of attention_output [R, H] from that of attention_sum.
  void attention_norm_tangent(const EncoderPass& pass, const LayerActivations& tangents,
                              const Direction& direction, const Tensor& y_tangent) const;

  EncoderConfig config_;
  int index_;
  OutputRows rows_;
  Tensors weights_, gradients_;
  LayerActivations saved_;
  Tensor input_;
};

}  // namespace bitfall
