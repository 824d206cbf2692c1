// Tangents of a layer's forward and backward pass along a direction in weight space, for exact
// Hessian products (Pearlmutter 1994). A product y = x W^T has the tangent x W'^T + x' W^T; the
// first term exists only in the layer whose weights move, the second only beyond its first matrix.
#include "engine/encoder_layer.h"

namespace bitfall {
namespace {

/// A tensor and its tangent.
struct Dual {
  Tensor value, tangent;
};

/// Tangents of the gradients of a linear layer: dweight = dy^T x, dbias = column sums of dy.
void weight_gradient_tangent(Backend& backend, const Dual& dy, const Dual& x, const Tensor& dweight,
                             const Tensor& dbias) {
  backend.linear_backward_weight(dy.tangent, x.value, dweight, dbias, Accumulate::no);
  backend.linear_backward_weight(dy.value, x.tangent, dweight, {}, Accumulate::yes);
}

}  // namespace

void EncoderLayer::forward_tangent(const EncoderPass& pass, const LayerHessian& hessian,
                                   std::span<const Tensor> direction, const Tensor& input_tangent,
                                   const Tensor& output_tangent) {
  const Direction along = direction.empty() ? Direction() : Direction{group(direction), {}};
  attention_forward_tangent(pass, hessian.tangents, along, input_tangent);
  feed_forward_forward_tangent(pass, hessian.tangents, along, output_tangent);
}

AttentionTangents EncoderLayer::attention_tangents(const LayerActivations& tangents) const {
  return {saved_.qkv,       tangents.qkv,       saved_.context,
          tangents.context, saved_.log_sum_exp, tangents.log_sum_exp};
}

void EncoderLayer::attention_forward_tangent(const EncoderPass& pass,
                                             const LayerActivations& tangents,
                                             const Direction& direction,
                                             const Tensor& input_tangent) {
  Backend& backend = pass.backend;
  const Tensors& moved = direction.weights;
  if (direction.given()) {
    backend.linear_forward(input_, moved.qkv_weight, moved.qkv_bias, tangents.qkv, Accumulate::no);
  } else {
    backend.linear_forward(input_tangent, weights_.qkv_weight, {}, tangents.qkv, Accumulate::no);
  }
  backend.attention_forward_tangent(attention_shape(pass), attention_tangents(tangents),
                                    pass.batch.sequence_starts);
  if (rows_ == OutputRows::first_token) {
    backend.gather_rows(tangents.context, pass.batch.first_tokens, tangents.context_rows);
  }
  if (direction.given()) {
    backend.linear_forward(saved_.context_rows, moved.attention_weight, moved.attention_bias,
                           tangents.attention_sum, Accumulate::no);
  } else if (rows_ == OutputRows::first_token) {
    backend.gather_rows(input_tangent, pass.batch.first_tokens, tangents.attention_sum);
  } else {
    backend.copy(input_tangent, tangents.attention_sum);
  }
  backend.linear_forward(tangents.context_rows, weights_.attention_weight, {},
                         tangents.attention_sum, Accumulate::yes);
}

void EncoderLayer::attention_norm_tangent(const EncoderPass& pass, const LayerActivations& tangents,
                                          const Direction& direction,
                                          const Tensor& y_tangent) const {
  LayerNormForwardTangent norm;
  norm.sum = saved_.attention_sum;
  norm.mean_rstd = saved_.attention_stats;
  norm.gamma = weights_.attention_gamma;
  norm.sum_tangent = tangents.attention_sum;
  norm.gamma_tangent = direction.weights.attention_gamma;
  norm.beta_tangent = direction.weights.attention_beta;
  norm.y_tangent = y_tangent;
  pass.backend.layer_norm_forward_tangent(norm);
}

void EncoderLayer::feed_forward_forward_tangent(const EncoderPass& pass,
                                                const LayerActivations& tangents,
                                                const Direction& direction,
                                                const Tensor& output_tangent) {
  Backend& backend = pass.backend;
  const Tensors& moved = direction.weights;
  // The residual lies where the rest of the sum is added.
  attention_norm_tangent(pass, tangents, direction, tangents.output_sum);
  backend.linear_forward(tangents.output_sum, weights_.intermediate_weight, {},
                         tangents.pre_activation, Accumulate::no);
  const Tensor activated_tangent = first_part(pass.scratch.wide, tangents.pre_activation.shape);
  Tensor activated;
  if (direction.given()) {
    backend.linear_forward(attention_norm(pass, {}), moved.intermediate_weight,
                           moved.intermediate_bias, tangents.pre_activation, Accumulate::yes);
    activated = first_part(pass.scratch.wide_tangent, tangents.pre_activation.shape);
  }
  backend.activation_backward(config_.hidden_act, saved_.pre_activation, tangents.pre_activation,
                              activated_tangent, activated);
  backend.linear_forward(activated_tangent, weights_.output_weight, {}, tangents.output_sum,
                         Accumulate::yes);
  if (direction.given()) {
    backend.linear_forward(activated, moved.output_weight, moved.output_bias, tangents.output_sum,
                           Accumulate::yes);
  }
  LayerNormForwardTangent norm;
  norm.sum = saved_.output_sum;
  norm.mean_rstd = saved_.output_stats;
  norm.gamma = weights_.output_gamma;
  norm.sum_tangent = tangents.output_sum;
  norm.gamma_tangent = moved.output_gamma;
  norm.beta_tangent = moved.output_beta;
  norm.y_tangent = output_tangent;
  backend.layer_norm_forward_tangent(norm);
}

void EncoderLayer::backward_tangent(const EncoderPass& pass, const LayerHessian& hessian,
                                    std::span<const Tensor> direction,
                                    std::span<const Tensor> product, const Tensor& d_output_tangent,
                                    const Tensor& d_input_tangent) {
  const Direction along =
      direction.empty() ? Direction() : Direction{group(direction), group(product)};
  const Tensor d_rows = d_output_tangent;
  feed_forward_backward_tangent(pass, hessian, along, d_rows);
  Tensor d_context = first_part(pass.scratch.hidden, d_rows.shape);
  attention_output_backward_tangent(pass, hessian, along, d_rows, d_context);
  if (rows_ == OutputRows::first_token) {
    const Tensor d_context_rows = d_context;
    d_context = pass.scratch.d_dense;
    pass.backend.scatter_rows(d_context_rows, pass.batch.first_tokens, d_context);
    if (!along.given()) {
      pass.backend.scatter_rows(d_rows, pass.batch.first_tokens, d_input_tangent);
    }
  }
  attention_backward_tangent(pass, hessian, along, d_context, d_input_tangent);
}

/// d_rows [R, H]: tangent of the gradient of the layer's output in, of attention_output out.
void EncoderLayer::feed_forward_backward_tangent(const EncoderPass& pass,
                                                 const LayerHessian& hessian,
                                                 const Direction& direction, const Tensor& d_rows) {
  Backend& backend = pass.backend;
  const LayerGradients& gradients = hessian.gradients;
  const LayerActivations& tangents = hessian.tangents;
  LayerNormBackwardTangent norm;
  norm.sum = saved_.output_sum;
  norm.mean_rstd = saved_.output_stats;
  norm.sum_tangent = tangents.output_sum;
  norm.gamma = weights_.output_gamma;
  norm.gamma_tangent = direction.weights.output_gamma;
  norm.dy = gradients.output;
  norm.dy_tangent = norm.dsum_tangent = d_rows;
  norm.dgamma_tangent = direction.product.output_gamma;
  norm.dbeta_tangent = direction.product.output_beta;
  backend.layer_norm_backward_tangent(norm);
  if (direction.given()) output_weight_tangent(pass, hessian, direction, d_rows);

  const Tensor d_wide = first_part(pass.scratch.wide, tangents.pre_activation.shape);
  backend.linear_backward_input(d_rows, weights_.output_weight, d_wide, Accumulate::no);
  if (direction.given()) {
    backend.linear_backward_input(gradients.output_sum, direction.weights.output_weight, d_wide,
                                  Accumulate::yes);
  }
  backend.activation_backward_tangent(config_.hidden_act, saved_.pre_activation,
                                      tangents.pre_activation, gradients.activated, d_wide, d_wide);
  backend.linear_backward_input(d_wide, weights_.intermediate_weight, d_rows, Accumulate::yes);
  if (direction.given()) intermediate_weight_tangent(pass, hessian, direction, d_wide, d_rows);
}

/// Tangent of d_output_sum^T activated, from that of d_output_sum [R, H].
void EncoderLayer::output_weight_tangent(const EncoderPass& pass, const LayerHessian& hessian,
                                         const Direction& direction,
                                         const Tensor& d_output_sum_tangent) {
  Backend& backend = pass.backend;
  const Shape wide = saved_.pre_activation.shape;
  const Tensor activated_tangent = first_part(pass.scratch.wide, wide);
  const Tensor activated = first_part(pass.scratch.wide_tangent, wide);
  backend.activation_backward(config_.hidden_act, saved_.pre_activation,
                              hessian.tangents.pre_activation, activated_tangent, activated);
  weight_gradient_tangent(backend, {hessian.gradients.output_sum, d_output_sum_tangent},
                          {activated, activated_tangent}, direction.product.output_weight,
                          direction.product.output_bias);
}

/// Tangent of d_pre_activation^T attention_output, from that of d_pre_activation [R, F]; and the
/// part of the tangent of attention_output's gradient that the moved weight makes, added to d_rows.
void EncoderLayer::intermediate_weight_tangent(const EncoderPass& pass, const LayerHessian& hessian,
                                               const Direction& direction,
                                               const Tensor& d_pre_activation_tangent,
                                               const Tensor& d_rows) {
  Backend& backend = pass.backend;
  const Tensor d_pre_activation =
      first_part(pass.scratch.wide_tangent, saved_.pre_activation.shape);
  backend.activation_backward(config_.hidden_act, saved_.pre_activation,
                              hessian.gradients.activated, d_pre_activation, {});
  const Tensor attention_output = attention_norm(pass, {});
  const Tensor attention_output_tangent = first_part(pass.scratch.d_dense, d_rows.shape);
  attention_norm_tangent(pass, hessian.tangents, direction, attention_output_tangent);
  weight_gradient_tangent(backend, {d_pre_activation, d_pre_activation_tangent},
                          {attention_output, attention_output_tangent},
                          direction.product.intermediate_weight,
                          direction.product.intermediate_bias);
  backend.linear_backward_input(d_pre_activation, direction.weights.intermediate_weight, d_rows,
                                Accumulate::yes);
}

/// d_rows [R, H]: tangent of the gradient of attention_output in, of attention_sum out.
/// d_context_rows [R, H] out.
void EncoderLayer::attention_output_backward_tangent(const EncoderPass& pass,
                                                     const LayerHessian& hessian,
                                                     const Direction& direction,
                                                     const Tensor& d_rows,
                                                     const Tensor& d_context_rows) {
  Backend& backend = pass.backend;
  const LayerGradients& gradients = hessian.gradients;
  LayerNormBackwardTangent norm;
  norm.sum = saved_.attention_sum;
  norm.mean_rstd = saved_.attention_stats;
  norm.sum_tangent = hessian.tangents.attention_sum;
  norm.gamma = weights_.attention_gamma;
  norm.gamma_tangent = direction.weights.attention_gamma;
  norm.dy = gradients.attention_output;
  norm.dy_tangent = norm.dsum_tangent = d_rows;
  norm.dgamma_tangent = direction.product.attention_gamma;
  norm.dbeta_tangent = direction.product.attention_beta;
  backend.layer_norm_backward_tangent(norm);
  backend.linear_backward_input(d_rows, weights_.attention_weight, d_context_rows, Accumulate::no);
  if (!direction.given()) return;
  backend.linear_backward_input(gradients.attention_sum, direction.weights.attention_weight,
                                d_context_rows, Accumulate::yes);
  weight_gradient_tangent(backend, {gradients.attention_sum, d_rows},
                          {saved_.context_rows, hessian.tangents.context_rows},
                          direction.product.attention_weight, direction.product.attention_bias);
}

/// The product for query, key and value; or, with the weights held, adds to d_input_tangent [T, H].
void EncoderLayer::attention_backward_tangent(const EncoderPass& pass, const LayerHessian& hessian,
                                              const Direction& direction,
                                              const Tensor& d_context_tangent,
                                              const Tensor& d_input_tangent) {
  Backend& backend = pass.backend;
  const Tensor d_qkv_tangent = first_part(pass.scratch.wide, saved_.qkv.shape);
  backend.attention_backward_tangent(attention_shape(pass), attention_tangents(hessian.tangents),
                                     hessian.gradients.context, d_context_tangent,
                                     pass.batch.sequence_starts, d_qkv_tangent);
  if (direction.given()) {
    backend.linear_backward_weight(d_qkv_tangent, input_, direction.product.qkv_weight,
                                   direction.product.qkv_bias, Accumulate::no);
  } else {
    backend.linear_backward_input(d_qkv_tangent, weights_.qkv_weight, d_input_tangent,
                                  Accumulate::yes);
  }
}

}  // namespace bitfall
