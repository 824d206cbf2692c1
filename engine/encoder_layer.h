// EncoderLayer: one BERT layer, forward and backward by hand over the backend's operations.
//
// Attention, its output projection, dropout + residual + LayerNorm, the feed-forward network,
// dropout + residual + LayerNorm. Where only the first token of each sequence is read afterwards
// (the last layer under a pooler), everything after attention runs on those B rows alone: the same
// numbers for a fraction of the work.
#pragma once

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

class EncoderLayer {
 public:
  EncoderLayer(const EncoderConfig& config, int index, OutputRows rows);

  /// Dropouts are numbered: 0 in the embeddings, then those of each layer, then the head's.
  static int first_free_dropout_site(int num_layers);

  OutputRows rows() const { return rows_; }
  /// In flat order.
  std::vector<ParameterSpec> parameters() const;
  /// Tensors parallel to parameters(); `gradients` may be empty if none will be computed. Throws
  /// ShapeError unless query, key and value are adjacent in memory.
  void bind(std::span<const Tensor> weights, std::span<const Tensor> gradients);
  /// input [T, H] -> output [R, H]; `activations` and `input` are read again by backward().
  void forward(const EncoderPass& pass, const LayerActivations& activations, const Tensor& input,
               const Tensor& output);
  /// Gradients of the layer's weights and of its input, as far as `what` says.
  ///
  /// Once per forward(): what that kept is overwritten, and so is d_output [R, H]. d_input [T, H]
  /// out; the memory of d_output when R = T.
  void backward(const EncoderPass& pass, Differentiate what, Accumulate accumulate,
                const Tensor& d_output, const Tensor& d_input);

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
  /// The first LayerNorm over attention_sum as it is: writes attention_output [R, H] (scratch).
  Tensor attention_norm(const EncoderPass& pass, LayerNormForward norm) const;
  void feed_forward_forward(const EncoderPass& pass, const Tensor& attention_output,
                            const Tensor& output);
  void feed_forward_backward(const EncoderPass& pass, Differentiate what, Accumulate accumulate,
                             const Tensor& d_rows);
  void attention_output_backward(const EncoderPass& pass, Differentiate what, Accumulate accumulate,
                                 const Tensor& d_rows, const Tensor& d_context_rows);
  void attention_backward(const EncoderPass& pass, Differentiate what, Accumulate accumulate,
                          const Tensor& d_context, const Tensor& d_input);

  EncoderConfig config_;
  int index_;
  OutputRows rows_;
  Tensors weights_, gradients_;
  LayerActivations saved_;
  Tensor input_;
};

}  // namespace bitfall
