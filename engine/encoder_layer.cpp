#include "engine/encoder_layer.h"

#include "core/error.h"

namespace bitfall {
namespace {

constexpr int kDropoutsPerLayer = 3;

/// Adjacent tensors [N0, ...], [N1, ...], ... as one [N0 + N1 + ..., ...].
Tensor join(std::span<const Tensor> parts, const char* what) {
  Tensor joined = parts[0];
  for (const Tensor& part : parts.subspan(1)) {
    check<ShapeError>(joined.as<std::byte>() + joined.bytes() == part.data, what,
                      " of query, key and value must be adjacent in memory, as a ParameterStore "
                      "places the parameters() of the model");
    const std::int64_t rows = joined.shape[0] + part.shape[0];
    joined.shape = part.shape.rank() == 2 ? Shape{rows, part.shape[1]} : Shape{rows};
  }
  return joined;
}

struct NormGradients {
  Tensor gamma, beta;
};

/// From norm.dy to norm.dresidual. Returns the gradient of the norm's x: in scratch.d_dense or,
/// without dropout, norm.dresidual itself.
Tensor norm_backward(const EncoderPass& pass, Differentiate what, Accumulate accumulate,
                     LayerNormBackward norm, const NormGradients& gradients) {
  if (norm.input_dropout.enabled()) norm.dx = first_part(pass.scratch.d_dense, norm.dy.shape);
  const bool wanted = what == Differentiate::weights_and_input;
  norm.dgamma = wanted ? gradients.gamma : pass.scratch.d_gamma;
  norm.dbeta = wanted ? gradients.beta : pass.scratch.d_beta;
  norm.accumulate = wanted ? accumulate : Accumulate::no;
  pass.backend.layer_norm_backward(norm);
  return norm.dx ? norm.dx : norm.dresidual;
}

/// Brings the gradient that flows through a residual to where the other path is added.
void pass_on(Backend& backend, const Tensor& source, const Tensor& destination) {
  if (source.data != destination.data) backend.copy(source, destination);
}

}  // namespace

LayerActivations LayerActivations::plan(Workspace& workspace, const EncoderConfig& config,
                                        DType compute_dtype, const EncoderBatch& batch,
                                        OutputRows rows) {
  const std::int64_t hidden = config.hidden_size;
  const std::int64_t tokens = batch.num_tokens;
  const std::int64_t kept = rows == OutputRows::all_tokens ? tokens : batch.num_sequences;
  LayerActivations planned;
  planned.qkv = workspace.take(compute_dtype, {tokens, 3 * hidden});
  planned.context = workspace.take(compute_dtype, {tokens, hidden});
  planned.log_sum_exp = workspace.take(DType::f32, {tokens, config.num_attention_heads});
  planned.context_rows = rows == OutputRows::all_tokens
                             ? planned.context
                             : workspace.take(compute_dtype, {kept, hidden});
  planned.attention_sum = workspace.take(compute_dtype, {kept, hidden});
  planned.attention_stats = workspace.take(DType::f32, {kept, 2});
  planned.pre_activation = workspace.take(compute_dtype, {kept, config.intermediate_size});
  planned.output_sum = workspace.take(compute_dtype, {kept, hidden});
  planned.output_stats = workspace.take(DType::f32, {kept, 2});
  return planned;
}

LayerGradients LayerGradients::in(const EncoderScratch& scratch, const EncoderConfig& config,
                                  OutputRows rows) {
  const bool all_tokens = rows == OutputRows::all_tokens;
  LayerGradients shared;
  shared.output = all_tokens ? scratch.d_hidden : scratch.rows;
  shared.output_sum = shared.attention_output = shared.attention_sum = shared.output;
  shared.activated = shared.pre_activation =
      first_part(scratch.wide, {shared.output.shape[0], config.intermediate_size});
  shared.context = all_tokens ? scratch.hidden : scratch.d_dense;
  return shared;
}

LayerGradients LayerGradients::plan(Workspace& workspace, const EncoderScratch& scratch,
                                    const EncoderConfig& config, DType compute_dtype,
                                    const EncoderBatch& batch, OutputRows rows) {
  LayerGradients own = in(scratch, config, rows);
  const Shape narrow = own.output.shape, wide = own.activated.shape;
  own.output = workspace.take(compute_dtype, narrow);
  own.output_sum = workspace.take(compute_dtype, narrow);
  own.activated = workspace.take(compute_dtype, wide);
  own.attention_output = workspace.take(compute_dtype, narrow);
  own.attention_sum = workspace.take(compute_dtype, narrow);
  own.context = workspace.take(compute_dtype, {batch.num_tokens, config.hidden_size});
  return own;
}

EncoderLayer::EncoderLayer(const EncoderConfig& config, int index, OutputRows rows)
    : config_(config), index_(index), rows_(rows) {}

std::vector<ParameterSpec> EncoderLayer::parameters() const {
  const std::int64_t hidden = config_.hidden_size;
  const std::int64_t intermediate = config_.intermediate_size;
  std::vector<ParameterSpec> specs;
  const auto add = [&](const char* name, const Shape& shape,
                       Placement placement = Placement::aligned) {
    specs.push_back({concat("bert.encoder.layer.", index_, ".", name), shape, index_, placement});
  };
  add("attention.self.query.weight", {hidden, hidden});
  add("attention.self.key.weight", {hidden, hidden}, Placement::adjacent);
  add("attention.self.value.weight", {hidden, hidden}, Placement::adjacent);
  add("attention.self.query.bias", {hidden});
  add("attention.self.key.bias", {hidden}, Placement::adjacent);
  add("attention.self.value.bias", {hidden}, Placement::adjacent);
  add("attention.output.dense.weight", {hidden, hidden});
  add("attention.output.dense.bias", {hidden});
  add("attention.output.LayerNorm.weight", {hidden});
  add("attention.output.LayerNorm.bias", {hidden});
  add("intermediate.dense.weight", {intermediate, hidden});
  add("intermediate.dense.bias", {intermediate});
  add("output.dense.weight", {hidden, intermediate});
  add("output.dense.bias", {hidden});
  add("output.LayerNorm.weight", {hidden});
  add("output.LayerNorm.bias", {hidden});
  return specs;
}

void EncoderLayer::bind(std::span<const Tensor> weights, std::span<const Tensor> gradients) {
  weights_ = group(weights);
  gradients_ = gradients.empty() ? Tensors() : group(gradients);
}

EncoderLayer::Tensors EncoderLayer::group(std::span<const Tensor> tensors) {
  return {join(tensors.first(3), "weights"),
          join(tensors.subspan(3, 3), "biases"),
          tensors[6],
          tensors[7],
          tensors[8],
          tensors[9],
          tensors[10],
          tensors[11],
          tensors[12],
          tensors[13],
          tensors[14],
          tensors[15]};
}

int EncoderLayer::first_free_dropout_site(std::int64_t num_layers) {
  return kDropoutsPerLayer * static_cast<int>(num_layers) + 1;
}

Dropout EncoderLayer::attention_probs_dropout(const EncoderPass& pass) const {
  return pass.dropout(config_.attention_probs_dropout_prob, kDropoutsPerLayer * index_ + 1);
}

Dropout EncoderLayer::attention_output_dropout(const EncoderPass& pass) const {
  return pass.dropout(config_.hidden_dropout_prob, kDropoutsPerLayer * index_ + 2);
}

Dropout EncoderLayer::output_dropout(const EncoderPass& pass) const {
  return pass.dropout(config_.hidden_dropout_prob, kDropoutsPerLayer * index_ + 3);
}

void EncoderLayer::plan(const Tensor& input, const LayerActivations& activations) {
  input_ = input;
  saved_ = activations;
}

void EncoderLayer::forward(const EncoderPass& pass, const Tensor& output) {
  const Tensor attention_output = attention_forward(pass);
  feed_forward_forward(pass, attention_output, output);
}

Tensor EncoderLayer::attention_forward(const EncoderPass& pass) {
  Backend& backend = pass.backend;
  const EncoderBatch& batch = pass.batch;
  backend.linear_forward(input_, weights_.qkv_weight, weights_.qkv_bias, saved_.qkv,
                         Accumulate::no);
  backend.attention_forward(attention_shape(pass), saved_.qkv, batch.sequence_starts,
                            batch.sample_keys, attention_probs_dropout(pass), saved_.context,
                            saved_.log_sum_exp);
  Tensor residual = input_;
  if (rows_ == OutputRows::first_token) {
    residual = pass.scratch.rows;
    backend.gather_rows(input_, batch.first_tokens, residual);
    backend.gather_rows(saved_.context, batch.first_tokens, saved_.context_rows);
  }
  backend.linear_forward(saved_.context_rows, weights_.attention_weight, weights_.attention_bias,
                         saved_.attention_sum, Accumulate::no);
  LayerNormForward norm;
  norm.residual = residual;
  norm.row_keys = pass.row_keys(rows_);
  norm.input_dropout = attention_output_dropout(pass);
  return attention_norm(pass, norm);
}

Tensor EncoderLayer::attention_norm(const EncoderPass& pass, LayerNormForward norm) const {
  norm.x = norm.sum = saved_.attention_sum;
  norm.gamma = weights_.attention_gamma;
  norm.beta = weights_.attention_beta;
  norm.epsilon = config_.layer_norm_eps;
  norm.mean_rstd = saved_.attention_stats;
  norm.y = first_part(pass.scratch.hidden, saved_.attention_sum.shape);
  pass.backend.layer_norm_forward(norm);
  return norm.y;
}

void EncoderLayer::feed_forward_forward(const EncoderPass& pass, const Tensor& attention_output,
                                        const Tensor& output) {
  const Tensor activated = first_part(pass.scratch.wide, saved_.pre_activation.shape);
  pass.backend.linear_activation_forward(attention_output, weights_.intermediate_weight,
                                         weights_.intermediate_bias, config_.hidden_act,
                                         saved_.pre_activation, activated);
  pass.backend.linear_forward(activated, weights_.output_weight, weights_.output_bias,
                              saved_.output_sum, Accumulate::no);
  LayerNormForward norm;
  norm.residual = attention_output;
  norm.row_keys = pass.row_keys(rows_);
  norm.input_dropout = output_dropout(pass);
  output_norm(pass, norm, output);
}

void EncoderLayer::output_norm(const EncoderPass& pass, LayerNormForward norm,
                               const Tensor& output) const {
  norm.x = norm.sum = saved_.output_sum;
  norm.gamma = weights_.output_gamma;
  norm.beta = weights_.output_beta;
  norm.epsilon = config_.layer_norm_eps;
  norm.mean_rstd = saved_.output_stats;
  norm.y = output;
  pass.backend.layer_norm_forward(norm);
}

void EncoderLayer::restore_output(const EncoderPass& pass, const Tensor& output) const {
  // output_sum holds dropout and residual already.
  output_norm(pass, {}, output);
}

void EncoderLayer::backward(const EncoderPass& pass, Differentiate what, Accumulate accumulate,
                            const LayerGradients& gradients, const RestoreInput& restore_input,
                            const Tensor& d_input) {
  feed_forward_backward(pass, what, accumulate, gradients);
  attention_output_backward(pass, what, accumulate, gradients);
  if (rows_ == OutputRows::first_token) {
    pass.backend.scatter_rows(gradients.attention_sum, pass.batch.first_tokens, d_input);
  } else {
    pass_on(pass.backend, gradients.attention_sum, d_input);
  }
  attention_backward(pass, what, accumulate, gradients.context, restore_input, d_input);
}

/// From gradients.output to gradients.attention_output.
void EncoderLayer::feed_forward_backward(const EncoderPass& pass, Differentiate what,
                                         Accumulate accumulate, const LayerGradients& gradients) {
  Backend& backend = pass.backend;
  LayerNormBackward norm;
  norm.dy = gradients.output;
  norm.dresidual = gradients.output_sum;
  norm.sum = saved_.output_sum;
  norm.mean_rstd = saved_.output_stats;
  norm.gamma = weights_.output_gamma;
  norm.row_keys = pass.row_keys(rows_);
  norm.input_dropout = output_dropout(pass);
  const Tensor d_dense = norm_backward(pass, what, accumulate, norm,
                                       {gradients_.output_gamma, gradients_.output_beta});
  backend.linear_backward_input(d_dense, weights_.output_weight, gradients.activated,
                                Accumulate::no);

  const bool wanted = what == Differentiate::weights_and_input;
  const Tensor activated = wanted ? saved_.pre_activation : Tensor();
  backend.activation_backward(config_.hidden_act, saved_.pre_activation, gradients.activated,
                              gradients.pre_activation, activated);
  if (wanted) {
    backend.linear_backward_weight(d_dense, activated, gradients_.output_weight,
                                   gradients_.output_bias, accumulate);
    // attention_sum holds dropout and residual already.
    const Tensor attention_output = attention_norm(pass, {});
    backend.linear_backward_weight(gradients.pre_activation, attention_output,
                                   gradients_.intermediate_weight, gradients_.intermediate_bias,
                                   accumulate);
  }
  pass_on(backend, gradients.output_sum, gradients.attention_output);
  backend.linear_backward_input(gradients.pre_activation, weights_.intermediate_weight,
                                gradients.attention_output, Accumulate::yes);
}

/// From gradients.attention_output to gradients.attention_sum, which is also the gradient of the
/// rows of the layer's input through the residual, and gradients.context.
void EncoderLayer::attention_output_backward(const EncoderPass& pass, Differentiate what,
                                             Accumulate accumulate,
                                             const LayerGradients& gradients) {
  LayerNormBackward norm;
  norm.dy = gradients.attention_output;
  norm.dresidual = gradients.attention_sum;
  norm.sum = saved_.attention_sum;
  norm.mean_rstd = saved_.attention_stats;
  norm.gamma = weights_.attention_gamma;
  norm.row_keys = pass.row_keys(rows_);
  norm.input_dropout = attention_output_dropout(pass);
  const Tensor d_dense = norm_backward(pass, what, accumulate, norm,
                                       {gradients_.attention_gamma, gradients_.attention_beta});
  const bool all_tokens = rows_ == OutputRows::all_tokens;
  const Tensor d_context_rows =
      all_tokens ? gradients.context : first_part(pass.scratch.hidden, d_dense.shape);
  pass.backend.linear_backward_input(d_dense, weights_.attention_weight, d_context_rows,
                                     Accumulate::no);
  if (what == Differentiate::weights_and_input) {
    pass.backend.linear_backward_weight(d_dense, saved_.context_rows, gradients_.attention_weight,
                                        gradients_.attention_bias, accumulate);
  }
  if (!all_tokens) {
    pass.backend.scatter_rows(d_context_rows, pass.batch.first_tokens, gradients.context);
  }
}

/// Adds the gradient through query, key and value to d_input [T, H].
void EncoderLayer::attention_backward(const EncoderPass& pass, Differentiate what,
                                      Accumulate accumulate, const Tensor& d_context,
                                      const RestoreInput& restore_input, const Tensor& d_input) {
  Backend& backend = pass.backend;
  const Tensor d_qkv = first_part(pass.scratch.wide, saved_.qkv.shape);
  backend.attention_backward(attention_shape(pass), d_context, saved_.qkv, saved_.context,
                             saved_.log_sum_exp, pass.batch.sequence_starts, pass.batch.sample_keys,
                             attention_probs_dropout(pass), d_qkv);
  if (what == Differentiate::weights_and_input) {
    const Tensor& input = pass.scratch.d_dense;  // d_context may have been there
    restore_input(input);
    backend.linear_backward_weight(d_qkv, input, gradients_.qkv_weight, gradients_.qkv_bias,
                                   accumulate);
  }
  backend.linear_backward_input(d_qkv, weights_.qkv_weight, d_input, Accumulate::yes);
}

}  // namespace bitfall
