#include "engine/encoder.h"

#include <algorithm>

#include "core/error.h"

namespace bitfall {
namespace {

constexpr std::size_t kEmbeddingParameters = 5;
constexpr int kEmbeddingDropoutSite = 0;

/// Pieces of a pass that are recorded, beside the backward pass of layer 0, 1, ...
constexpr std::uint64_t kForwardPiece = std::uint64_t{1} << 32,
                        kEmbeddingsBackwardPiece = kForwardPiece + 1;

std::vector<ParameterSpec> embedding_parameters(const EncoderConfig& config) {
  const std::int64_t hidden = config.hidden_size;
  const std::string prefix = "bert.embeddings.";
  return {{prefix + "word_embeddings.weight", {config.vocab_size, hidden}},
          {prefix + "position_embeddings.weight", {config.max_position_embeddings, hidden}},
          {prefix + "token_type_embeddings.weight", {config.type_vocab_size, hidden}},
          {prefix + "LayerNorm.weight", {hidden}},
          {prefix + "LayerNorm.bias", {hidden}}};
}

void check_bound(const char* what, std::span<const Tensor> tensors,
                 const std::vector<ParameterSpec>& specs, DType dtype) {
  check<ShapeError>(tensors.size() == specs.size(), "bind: ", tensors.size(), " ", what,
                    " for a model of ", specs.size(), " parameters");
  for (std::size_t i = 0; i < specs.size(); ++i) {
    const Tensor& tensor = tensors[i];
    check<ShapeError>(tensor && tensor.dtype == dtype && tensor.shape == specs[i].shape,
                      "bind: ", what, " of ", specs[i].name, " are ", name(tensor.dtype), " ",
                      tensor.shape.to_string(), ", expected ", name(dtype), " ",
                      specs[i].shape.to_string());
  }
}

}  // namespace

Encoder::Encoder(Backend& backend, const EncoderConfig& config, const HeadConfig& head)
    : Encoder(backend, config, make_head(config, head)) {}

Encoder::Encoder(Backend& backend, const EncoderConfig& config, OutputRows rows)
    : Encoder(backend, config, make_absent_head(rows)) {}

Encoder::Encoder(Backend& backend, const EncoderConfig& config, std::unique_ptr<Head> head)
    : backend_(backend),
      config_(config),
      head_(std::move(head)),
      parameters_(embedding_parameters(config)),
      recorder_(backend.make_recorder()),
      workspace_(backend) {
  const int count = static_cast<int>(config.num_hidden_layers);
  const auto append = [this](const std::vector<ParameterSpec>& specs) {
    parameters_.insert(parameters_.end(), specs.begin(), specs.end());
  };
  for (int index = 0; index < count; ++index) {
    const OutputRows rows = index + 1 == count ? head_->rows() : OutputRows::all_tokens;
    layers_.emplace_back(config, index, rows);
    append(layers_.back().parameters());
  }
  append(head_->parameters());
}

void Encoder::bind(std::span<const Tensor> weights, std::span<const Tensor> gradients) {
  const DType dtype = weights.empty() ? DType::f32 : weights[0].dtype;
  check_bound("weights", weights, parameters_, dtype);
  has_gradients_ = !gradients.empty();
  if (has_gradients_) check_bound("gradients", gradients, parameters_, DType::f32);
  // The next `count` tensors of both lists; no gradients give none.
  std::size_t position = 0;
  const auto bind_next = [&](std::size_t count, auto&& bind) {
    bind(weights.subspan(position, count),
         has_gradients_ ? gradients.subspan(position, count) : gradients);
    position += count;
  };
  bind_next(kEmbeddingParameters, [this](const auto& w, const auto& g) {
    embeddings_ = {{w[0], w[1], w[2]}, w[3], w[4]};
    if (!g.empty()) embedding_gradients_ = {{g[0], g[1], g[2]}, g[3], g[4]};
  });
  for (EncoderLayer& layer : layers_) {
    bind_next(layer.parameters().size(),
              [&layer](const auto& w, const auto& g) { layer.bind(w, g); });
  }
  bind_next(head_->parameters().size(),
            [this](const auto& w, const auto& g) { head_->bind(w, g); });
  bound_key_.clear();
  for (const std::span<const Tensor> tensors : {weights, gradients}) {
    for (const Tensor& tensor : tensors) bound_key_.push_back(tensor.address());
  }
  compute_dtype_ = dtype;
  bound_ = true;
  backward_possible_ = hessian_prepared_ = false;
}

void Encoder::forward(const Batch& batch, const ForwardContext& context) {
  start(batch, context, Purpose::pass);
  record({kForwardPiece}, [this] { run_forward(); });
  backward_possible_ = context.mode != Mode::evaluate;
}

void Encoder::run_forward() {
  embeddings_forward(scratch_.hidden, hidden_[0]);
  for (std::size_t i = 0; i < layers_.size(); ++i) {
    layers_[i].forward(pass(), hidden_[i + 1]);
  }
  head_->forward(pass());
}

void Encoder::record(const RecordKey& piece, const std::function<void()>& work) {
  RecordKey key = planned_key_;
  key.insert(key.end(), piece.begin(), piece.end());
  recorder_->run(key, work);
}

void Encoder::start(const Batch& batch, const ForwardContext& context, Purpose purpose) {
  check<ShapeError>(bound_, "the model has no weights yet: call bind first");
  check_batch(batch, config_);
  head_->check_labels(batch);
  context_ = context;
  backward_possible_ = hessian_prepared_ = false;
  // A head that reads every token would read those that fill up, too.
  const bool all_tokens = head_->rows() == OutputRows::all_tokens;
  const std::int64_t token_multiple = all_tokens ? 1 : recorder_->size_multiple();
  workspace_.plan([&] {
    device_batch_.plan(workspace_, batch, token_multiple);
    plan_scratch();
    plan_activations(purpose);
    hessian_.clear();
    if (purpose == Purpose::hessian) plan_hessian();
    head_->plan(workspace_, compute_dtype_, device_batch_, hidden_.back());
  });
  device_batch_.upload(backend_, batch, context.step);
  planned_key_ = key_of_plan(purpose);
}

RecordKey Encoder::key_of_plan(Purpose purpose) const {
  const EncoderBatch& batch = device_batch_;
  RecordKey key = bound_key_;
  // Where all else lies in the workspace follows from what is in it, and from its beginning.
  for (const Tensor& tensor : {batch.ids.input_ids, batch.key_lengths, batch.class_labels,
                               batch.regression_labels, batch.span_positions}) {
    key.push_back(tensor.address());
  }
  for (const std::int64_t number : {batch.num_tokens, batch.num_sequences}) {
    key.push_back(static_cast<std::uint64_t>(number));
  }
  key.push_back(static_cast<std::uint64_t>(context_.mode));
  key.push_back(context_.seed);
  key.push_back(static_cast<std::uint64_t>(purpose));
  return key;
}

void Encoder::plan_scratch() {
  const std::int64_t tokens = device_batch_.num_tokens;
  const std::int64_t hidden = config_.hidden_size;
  const std::int64_t intermediate = config_.intermediate_size;
  const auto take = [&](std::int64_t rows, std::int64_t columns) {
    return workspace_.take(compute_dtype_, {rows, columns});
  };
  scratch_ = EncoderScratch();
  scratch_.wide = take(tokens, std::max(intermediate, 3 * hidden));
  scratch_.hidden = take(tokens, hidden);
  scratch_.rows = take(device_batch_.num_sequences, hidden);
  scratch_.d_hidden = take(tokens, hidden);
  scratch_.d_dense = take(tokens, hidden);
  scratch_.d_gamma = workspace_.take(DType::f32, {hidden});
  scratch_.d_beta = workspace_.take(DType::f32, {hidden});
}

void Encoder::plan_activations(Purpose purpose) {
  const std::int64_t tokens = device_batch_.num_tokens;
  const std::int64_t hidden = config_.hidden_size;
  embedding_stats_ = workspace_.take(DType::f32, {tokens, 2});
  hidden_.clear();
  activations_.clear();
  for (std::size_t index = 0; index < layers_.size(); ++index) {
    const OutputRows rows = layers_[index].rows();
    // Two inputs alternate; the backward pass restores them from what is kept.
    const Tensor& input = index % 2 == 0 ? scratch_.d_dense : scratch_.d_hidden;
    hidden_.push_back(
        purpose == Purpose::hessian ? workspace_.take(compute_dtype_, {tokens, hidden}) : input);
    const bool share =
        context_.mode == Mode::evaluate && index >= 1 && rows == layers_[index - 1].rows();
    activations_.push_back(
        share ? activations_[index - 1]
              : LayerActivations::plan(workspace_, config_, compute_dtype_, device_batch_, rows));
    layers_[index].plan(hidden_.back(), activations_.back());
  }
  const bool all_tokens = head_->rows() == OutputRows::all_tokens;
  hidden_.push_back(
      workspace_.take(compute_dtype_, {all_tokens ? tokens : device_batch_.num_sequences, hidden}));
}

void Encoder::embeddings_forward(const Tensor& sum, const Tensor& output) {
  backend_.embedding_forward(device_batch_.ids, embeddings_.tables, sum);
  LayerNormForward norm;
  norm.x = norm.sum = sum;
  norm.gamma = embeddings_.gamma;
  norm.beta = embeddings_.beta;
  norm.row_keys = device_batch_.row_keys;
  norm.output_dropout = pass().dropout(config_.hidden_dropout_prob, kEmbeddingDropoutSite);
  norm.epsilon = config_.layer_norm_eps;
  norm.mean_rstd = embedding_stats_;
  norm.y = output;
  backend_.layer_norm_forward(norm);
}

void Encoder::restore_input(std::size_t layer, const Tensor& input) {
  if (layer > 0) return layers_[layer - 1].restore_output(pass(), input);
  embeddings_forward(scratch_.hidden, input);
}

void Encoder::check_backward_possible() const {
  check<ShapeError>(backward_possible_,
                    "backward needs the activations of a forward pass in Mode::train or "
                    "Mode::differentiate right before it, and uses them up");
  check<ShapeError>(has_gradients_, "backward needs gradients: none were given to bind");
}

void Encoder::backward(float scale, Accumulate accumulate, const BlockReady& on_block_ready) {
  check_backward_possible();
  backward_from(head_->loss_gradient(pass(), scale), accumulate, on_block_ready);
}

void Encoder::backward_from(const Tensor& d_logits, Accumulate accumulate,
                            const BlockReady& on_block_ready) {
  check_backward_possible();
  const Tensor& logits = head_->logits();
  check<ShapeError>(d_logits.dtype == logits.dtype && d_logits.shape == logits.shape,
                    "backward_from: d_logits are ", name(d_logits.dtype), " ",
                    d_logits.shape.to_string(), ", expected ", name(logits.dtype), " ",
                    logits.shape.to_string());
  const auto ready = [&on_block_ready](int block) {
    if (on_block_ready) on_block_ready(block);
  };
  const auto adds = static_cast<std::uint64_t>(accumulate);
  for (int index = num_layers() - 1; index >= 0; --index) {
    const auto position = static_cast<std::size_t>(index);
    record({position, adds, d_logits.address()}, [&] {
      if (index + 1 == num_layers()) head_backward(d_logits, accumulate);
      layer_backward(position, accumulate);
    });
    ready(index);
  }
  record({kEmbeddingsBackwardPiece, adds}, [&] { embeddings_backward(accumulate); });
  backward_possible_ = false;
  ready(kNoBlock);
}

void Encoder::head_backward(const Tensor& d_logits, Accumulate accumulate) {
  head_->backward(pass(), d_logits, Differentiate::weights_and_input, accumulate,
                  scratch_gradients(layers_.back()).output);
}

void Encoder::layer_backward(std::size_t index, Accumulate accumulate) {
  layers_[index].backward(
      pass(), Differentiate::weights_and_input, accumulate, scratch_gradients(layers_[index]),
      [this, index](const Tensor& input) { restore_input(index, input); }, scratch_.d_hidden);
}

void Encoder::embeddings_backward(Accumulate accumulate) {
  LayerNormBackward norm;
  backend_.embedding_forward(device_batch_.ids, embeddings_.tables, scratch_.hidden);
  norm.dy = norm.dresidual = scratch_.d_hidden;
  norm.sum = scratch_.hidden;
  norm.mean_rstd = embedding_stats_;
  norm.gamma = embeddings_.gamma;
  norm.row_keys = device_batch_.row_keys;
  norm.output_dropout = pass().dropout(config_.hidden_dropout_prob, kEmbeddingDropoutSite);
  norm.dgamma = embedding_gradients_.gamma;
  norm.dbeta = embedding_gradients_.beta;
  norm.accumulate = accumulate;
  backend_.layer_norm_backward(norm);
  const EmbeddingTables& tables = embedding_gradients_.tables;
  if (accumulate == Accumulate::no) {
    for (const Tensor& table : {tables.word, tables.position, tables.token_type}) {
      backend_.fill_zero(table);
    }
  }
  backend_.embedding_backward(device_batch_.ids, scratch_.d_hidden, tables);
}

}  // namespace bitfall
