#include "engine/heads.h"

#include "core/error.h"
#include "engine/encoder_layer.h"

namespace bitfall {
namespace {

void check_count(const char* what, std::size_t seen, std::int64_t expected) {
  check<ShapeError>(static_cast<std::int64_t>(seen) == expected, "batch.", what, " has ", seen,
                    " entries, expected ", expected);
}

void check_absent(const char* what, bool absent, const char* head) {
  check<ShapeError>(absent, "batch.", what, " given to a ", head, " head");
}

/// BertForSequenceClassification: pooler (dense, tanh), dropout, linear classifier.
class PooledHead final : public Head {
 public:
  PooledHead(const EncoderConfig& config, const HeadConfig& head)
      : hidden_size_(config.hidden_size),
        dropout_probability_(config.classifier_dropout),
        dropout_site_(EncoderLayer::first_free_dropout_site(config.num_hidden_layers)),
        head_(head) {}

  OutputRows rows() const override { return OutputRows::first_token; }

  std::vector<ParameterSpec> parameters() const override {
    return {{"bert.pooler.dense.weight", {hidden_size_, hidden_size_}},
            {"bert.pooler.dense.bias", {hidden_size_}},
            {"classifier.weight", {head_.num_labels, hidden_size_}},
            {"classifier.bias", {head_.num_labels}}};
  }

  void bind(std::span<const Tensor> weights, std::span<const Tensor> gradients) override {
    weights_ = group(weights);
    gradients_ = gradients.empty() ? Tensors() : group(gradients);
  }

  void check_labels(const Batch& batch) const override;

  void plan(Workspace& workspace, DType compute_dtype, const EncoderBatch& batch,
            const Tensor& hidden) override {
    const std::int64_t rows = batch.num_sequences;
    hidden_ = hidden;
    pre_activation_ = workspace.take(compute_dtype, {rows, hidden_size_});
    pooled_ = workspace.take(compute_dtype, {rows, hidden_size_});
    logits_ = workspace.take(compute_dtype, {rows, head_.num_labels});
    d_logits_ = workspace.take(compute_dtype, {rows, head_.num_labels});
    logits_tangent_ = workspace.take(compute_dtype, {rows, head_.num_labels});
    d_logits_tangent_ = workspace.take(compute_dtype, {rows, head_.num_labels});
    if (is_regression()) no_labels_ = workspace.take(DType::f32, {rows});
    loss_ = labels(batch) ? workspace.take(DType::f32, {1}) : Tensor();
  }

  void forward(const EncoderPass& pass) override;
  void backward(const EncoderPass& pass, const Tensor& d_logits, Differentiate what,
                Accumulate accumulate, const Tensor& d_hidden) override;
  void tangent(const EncoderPass& pass, float scale, const Tensor& hidden_tangent,
               const Tensor& d_hidden_tangent) override;

 private:
  void loss_backward(const EncoderPass& pass, float scale) override;
  /// d_logits_tangent_ from logits_tangent_.
  void loss_tangent(const EncoderPass& pass, float scale);
  struct Tensors {
    Tensor pooler_weight, pooler_bias;          ///< [H, H], [H]
    Tensor classifier_weight, classifier_bias;  ///< [C, H], [C]
  };

  static Tensors group(std::span<const Tensor> tensors) {
    return {tensors[0], tensors[1], tensors[2], tensors[3]};
  }
  bool is_regression() const { return head_.type == HeadType::regression; }
  const Tensor& labels(const EncoderBatch& batch) const {
    return is_regression() ? batch.regression_labels : batch.class_labels;
  }

  std::int64_t hidden_size_;
  float dropout_probability_;
  int dropout_site_;
  HeadConfig head_;
  Tensors weights_, gradients_;
  Tensor hidden_, pre_activation_, pooled_;
  Tensor no_labels_;  ///< [R] f32, regression: zeros
};

void PooledHead::check_labels(const Batch& batch) const {
  check_absent("span_positions", batch.span_positions.empty(), "classification or regression");
  if (is_regression()) {
    check_absent("class_labels", batch.class_labels.empty(), "regression");
    if (!batch.regression_labels.empty()) {
      check_count("regression_labels", batch.regression_labels.size(), batch.num_sequences());
    }
    return;
  }
  check_absent("regression_labels", batch.regression_labels.empty(), "classification");
  if (batch.class_labels.empty()) return;
  check_count("class_labels", batch.class_labels.size(), batch.num_sequences());
  for (std::size_t b = 0; b < batch.class_labels.size(); ++b) {
    const std::int32_t label = batch.class_labels[b];
    check<ShapeError>(label >= 0 && label < head_.num_labels, "batch.class_labels[", b,
                      "] = ", label, ": expected 0..", head_.num_labels - 1,
                      " (num_labels of the model is ", head_.num_labels, ")");
  }
}

void PooledHead::forward(const EncoderPass& pass) {
  Backend& backend = pass.backend;
  const Dropout dropout = pass.dropout(dropout_probability_, dropout_site_);
  backend.linear_activation_forward(hidden_, weights_.pooler_weight, weights_.pooler_bias,
                                    Activation::tanh, pre_activation_, pooled_);
  if (dropout.enabled()) {
    backend.dropout(dropout, pass.batch.first_token_keys, pooled_, pooled_);
  }
  backend.linear_forward(pooled_, weights_.classifier_weight, weights_.classifier_bias, logits_,
                         Accumulate::no);
  if (!loss_) return;
  if (is_regression()) {
    backend.mean_squared_error_forward(logits_, labels(pass.batch), loss_);
  } else {
    backend.cross_entropy_forward(logits_, labels(pass.batch), loss_);
  }
}

void PooledHead::loss_backward(const EncoderPass& pass, float scale) {
  if (is_regression()) {
    pass.backend.mean_squared_error_backward(logits_, labels(pass.batch), scale, d_logits_);
  } else {
    pass.backend.cross_entropy_backward(logits_, labels(pass.batch), scale, d_logits_);
  }
}

void PooledHead::backward(const EncoderPass& pass, const Tensor& d_logits, Differentiate what,
                          Accumulate accumulate, const Tensor& d_hidden) {
  Backend& backend = pass.backend;
  const Tensor d_pooled = first_part(pass.scratch.d_dense, pooled_.shape);
  backend.linear_backward_input(d_logits, weights_.classifier_weight, d_pooled, Accumulate::no);
  if (const Dropout dropout = pass.dropout(dropout_probability_, dropout_site_);
      dropout.enabled()) {
    backend.dropout(dropout, pass.batch.first_token_keys, d_pooled, d_pooled);
  }
  backend.activation_backward(Activation::tanh, pre_activation_, d_pooled, d_pooled, Tensor());
  backend.linear_backward_input(d_pooled, weights_.pooler_weight, d_hidden, Accumulate::no);
  if (what == Differentiate::input_only) return;
  backend.linear_backward_weight(d_logits, pooled_, gradients_.classifier_weight,
                                 gradients_.classifier_bias, accumulate);
  backend.linear_backward_weight(d_pooled, hidden_, gradients_.pooler_weight,
                                 gradients_.pooler_bias, accumulate);
}

void PooledHead::tangent(const EncoderPass& pass, float scale, const Tensor& hidden_tangent,
                         const Tensor& d_hidden_tangent) {
  Backend& backend = pass.backend;
  const Tensor z_tangent = first_part(pass.scratch.hidden, pooled_.shape);
  const Tensor pooled_tangent = first_part(pass.scratch.d_dense, pooled_.shape);
  backend.linear_forward(hidden_tangent, weights_.pooler_weight, {}, z_tangent, Accumulate::no);
  backend.activation_backward(Activation::tanh, pre_activation_, z_tangent, pooled_tangent, {});
  backend.linear_forward(pooled_tangent, weights_.classifier_weight, {}, logits_tangent_,
                         Accumulate::no);
  loss_tangent(pass, scale);
  const Tensor d_pooled = first_part(pass.scratch.wide, pooled_.shape);
  const Tensor& d_pooled_tangent = pooled_tangent;
  backend.linear_backward_input(d_logits_, weights_.classifier_weight, d_pooled, Accumulate::no);
  backend.linear_backward_input(d_logits_tangent_, weights_.classifier_weight, d_pooled_tangent,
                                Accumulate::no);
  backend.activation_backward_tangent(Activation::tanh, pre_activation_, z_tangent, d_pooled,
                                      d_pooled_tangent, d_pooled_tangent);
  backend.linear_backward_input(d_pooled_tangent, weights_.pooler_weight, d_hidden_tangent,
                                Accumulate::no);
}

void PooledHead::loss_tangent(const EncoderPass& pass, float scale) {
  if (is_regression()) {
    // The gradient of a squared error is linear in the predictions, the labels its constant.
    pass.backend.fill_zero(no_labels_);
    pass.backend.mean_squared_error_backward(logits_tangent_, no_labels_, scale, d_logits_tangent_);
  } else {
    pass.backend.cross_entropy_backward_tangent(logits_, logits_tangent_, scale, d_logits_tangent_);
  }
}

/// BertForQuestionAnswering: one linear layer gives each token a start and an end score.
class SpanHead final : public Head {
 public:
  explicit SpanHead(const EncoderConfig& config) : hidden_size_(config.hidden_size) {}

  OutputRows rows() const override { return OutputRows::all_tokens; }

  std::vector<ParameterSpec> parameters() const override {
    return {{"qa_outputs.weight", {2, hidden_size_}}, {"qa_outputs.bias", {2}}};
  }

  void bind(std::span<const Tensor> weights, std::span<const Tensor> gradients) override {
    weight_ = weights[0];
    bias_ = weights[1];
    d_weight_ = gradients.empty() ? Tensor() : gradients[0];
    d_bias_ = gradients.empty() ? Tensor() : gradients[1];
  }

  void check_labels(const Batch& batch) const override;

  void plan(Workspace& workspace, DType compute_dtype, const EncoderBatch& batch,
            const Tensor& hidden) override {
    hidden_ = hidden;
    logits_ = workspace.take(compute_dtype, {batch.num_tokens, 2});
    d_logits_ = workspace.take(compute_dtype, {batch.num_tokens, 2});
    logits_tangent_ = workspace.take(compute_dtype, {batch.num_tokens, 2});
    d_logits_tangent_ = workspace.take(compute_dtype, {batch.num_tokens, 2});
    loss_ = batch.span_positions ? workspace.take(DType::f32, {1}) : Tensor();
  }

  void forward(const EncoderPass& pass) override {
    pass.backend.linear_forward(hidden_, weight_, bias_, logits_, Accumulate::no);
    if (loss_) {
      pass.backend.span_cross_entropy_forward(logits_, pass.batch.sequence_starts,
                                              pass.batch.span_positions, loss_);
    }
  }

  void backward(const EncoderPass& pass, const Tensor& d_logits, Differentiate what,
                Accumulate accumulate, const Tensor& d_hidden) override {
    pass.backend.linear_backward_input(d_logits, weight_, d_hidden, Accumulate::no);
    if (what == Differentiate::input_only) return;
    pass.backend.linear_backward_weight(d_logits, hidden_, d_weight_, d_bias_, accumulate);
  }

  void tangent(const EncoderPass& pass, float scale, const Tensor& hidden_tangent,
               const Tensor& d_hidden_tangent) override {
    pass.backend.linear_forward(hidden_tangent, weight_, {}, logits_tangent_, Accumulate::no);
    pass.backend.span_cross_entropy_backward_tangent(
        logits_, logits_tangent_, pass.batch.sequence_starts, scale, d_logits_tangent_);
    pass.backend.linear_backward_input(d_logits_tangent_, weight_, d_hidden_tangent,
                                       Accumulate::no);
  }

 private:
  void loss_backward(const EncoderPass& pass, float scale) override {
    pass.backend.span_cross_entropy_backward(logits_, pass.batch.sequence_starts,
                                             pass.batch.span_positions, scale, d_logits_);
  }

  std::int64_t hidden_size_;
  Tensor weight_, bias_, d_weight_, d_bias_;
  Tensor hidden_;
};

void SpanHead::check_labels(const Batch& batch) const {
  check_absent("class_labels", batch.class_labels.empty(), "span");
  check_absent("regression_labels", batch.regression_labels.empty(), "span");
  if (batch.span_positions.empty()) return;
  check_count("span_positions", batch.span_positions.size(), 2 * batch.num_sequences());
  for (std::size_t i = 0; i < batch.span_positions.size(); ++i) {
    const std::int32_t length = batch.sequence_starts[i / 2 + 1] - batch.sequence_starts[i / 2];
    const std::int32_t position = batch.span_positions[i];
    check<ShapeError>(position >= 0 && position < length, "batch.span_positions[", i / 2, "][",
                      i % 2, "] = ", position, ": expected 0..", length - 1,
                      ", a token of its sequence");
  }
}

/// BertModel itself.
class AbsentHead final : public Head {
 public:
  explicit AbsentHead(OutputRows rows) : rows_(rows) {}

  OutputRows rows() const override { return rows_; }
  std::vector<ParameterSpec> parameters() const override { return {}; }
  void bind(std::span<const Tensor> /*weights*/, std::span<const Tensor> /*gradients*/) override {}

  void check_labels(const Batch& batch) const override {
    const bool absent = batch.class_labels.empty() && batch.regression_labels.empty() &&
                        batch.span_positions.empty();
    check<ShapeError>(absent, "the batch has labels: a model without a head takes none");
  }

  void plan(Workspace& /*workspace*/, DType /*compute_dtype*/, const EncoderBatch& /*batch*/,
            const Tensor& hidden) override {
    logits_ = hidden;
  }

  void forward(const EncoderPass& /*pass*/) override {}

  void backward(const EncoderPass& pass, const Tensor& d_logits, Differentiate /*what*/,
                Accumulate /*accumulate*/, const Tensor& d_hidden) override {
    pass.backend.copy(d_logits, d_hidden);
  }

  void tangent(const EncoderPass& /*pass*/, float /*scale*/, const Tensor& /*hidden_tangent*/,
               const Tensor& /*d_hidden_tangent*/) override {
    throw ShapeError("a model without a head has no loss, so no Hessian");
  }

 private:
  void loss_backward(const EncoderPass& /*pass*/, float /*scale*/) override {}

  OutputRows rows_;
};

}  // namespace

const Tensor& Head::loss_gradient(const EncoderPass& pass, float scale) {
  check<ShapeError>(static_cast<bool>(loss_), "the batch of the last forward pass had no labels");
  loss_backward(pass, scale);
  return d_logits_;
}

HeadType parse_head_type(std::string_view name) {
  if (name == "classification") return HeadType::classification;
  if (name == "regression") return HeadType::regression;
  if (name == "span") return HeadType::span;
  throw ConfigError(concat("head '", name, "': expected classification, regression or span"));
}

std::unique_ptr<Head> make_head(const EncoderConfig& config, const HeadConfig& head) {
  switch (head.type) {
    case HeadType::classification:
      check<ConfigError>(head.num_labels >= 2, "num_labels = ", head.num_labels,
                         ": a classification head needs at least 2; for 1 use regression");
      return std::make_unique<PooledHead>(config, head);
    case HeadType::regression:
      check<ConfigError>(head.num_labels == 1, "num_labels = ", head.num_labels,
                         ": a regression head has 1");
      return std::make_unique<PooledHead>(config, head);
    case HeadType::span:
      check<ConfigError>(head.num_labels == 2, "num_labels = ", head.num_labels,
                         ": a span head has 2, start and end");
      return std::make_unique<SpanHead>(config);
  }
  throw ConfigError("unknown head type");
}

std::unique_ptr<Head> make_absent_head(OutputRows rows) {
  return std::make_unique<AbsentHead>(rows);
}

}  // namespace bitfall
