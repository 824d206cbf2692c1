#include "engine/engine.h"

#include <algorithm>

#include "core/error.h"
#include "engine/model_hessian.h"

namespace bitfall {
namespace {

std::vector<float> floats_on_host(Backend& backend, const Tensor& tensor) {
  std::vector<float> values(static_cast<std::size_t>(tensor.numel()));
  backend.copy(tensor, Tensor{values.data(), DType::f32, tensor.shape, Device::cpu});
  return values;
}

}  // namespace

Engine::Engine(std::unique_ptr<Backend> backend, std::unique_ptr<Model> model,
               Communicator& communicator, const CompletedConfig& config,
               const LoadWeights& load_weights)
    : communicator_(communicator),
      backend_(std::move(backend)),
      model_(std::move(model)),
      updater_(*backend_, communicator, config, model_->parameters(), load_weights),
      loss_buffer_(backend_->allocate(sizeof(float))),
      loss_(loss_buffer_.view(DType::f32, Shape{1})) {}

StepResult Engine::train_batch(std::span<const Batch> micro_batches) {
  const auto most = static_cast<std::size_t>(config().gradient_accumulation_steps);
  check<ShapeError>(micro_batches.size() <= most, "train_batch: ", micro_batches.size(),
                    " micro-batches, expected at most gradient_accumulation_steps = ", most);
  bind_training();
  accumulate_gradients(micro_batches);
  return updater_.step(loss_, [&] {
    return std::make_unique<ModelHessian>(*backend_, communicator_, *model_, store(),
                                          updater_.gradient_views(), micro_batches);
  });
}

void Engine::bind_training() {
  updater_.release_evaluation_weights();
  if (binding_ == Binding::training) return;
  model_->bind(store().views(store().working()), updater_.gradient_views());
  binding_ = Binding::training;
}

void Engine::accumulate_gradients(std::span<const Batch> micro_batches) {
  // Weights of micro-batches for which the mean over ranks is the mean over all samples.
  const double per_sample = communicator_.world_size() / count_samples(micro_batches);
  const std::size_t rounds = count_rounds(micro_batches.size());
  if (micro_batches.empty()) backend_->fill_zero(loss_);
  const bool reduce_each = updater_.reduces_every_micro_batch();
  for (std::size_t i = 0; i < rounds; ++i) {
    const Accumulate accumulate = i == 0 ? Accumulate::no : Accumulate::yes;
    if (i >= micro_batches.size()) {
      updater_.contribute_nothing(accumulate);
      continue;
    }
    const double share = per_sample * static_cast<double>(micro_batches[i].num_sequences());
    forward(micro_batches[i], share, accumulate);
    updater_.timer().measure("backward", [&] {
      const auto scale = static_cast<float>(updater_.loss_scale() * share);
      model_->backward(scale, reduce_each ? Accumulate::no : accumulate, [&](int block) {
        if (reduce_each || i + 1 == rounds) updater_.start_reduction(block, accumulate);
      });
    });
  }
}

void Engine::forward(const Batch& micro_batch, double share, Accumulate accumulate) {
  // A skipped step draws new dropout masks, so it counts here.
  const auto dropout_step =
      static_cast<std::uint32_t>(updater_.global_step() + updater_.skipped_steps());
  const ForwardContext context{Mode::train, config().seed, dropout_step};
  updater_.timer().measure("forward", [&] { model_->forward(micro_batch, context); });
  check<ShapeError>(static_cast<bool>(model_->loss()),
                    "train_batch: a micro-batch has no labels; training needs them");
  const float keep = accumulate == Accumulate::yes ? 1.0f : 0.0f;
  backend_->axpby(static_cast<float>(share), model_->loss(), keep, loss_);
}

std::size_t Engine::count_rounds(std::size_t micro_batches) {
  float rounds = static_cast<float>(std::max<std::size_t>(1, micro_batches));
  if (updater_.reduces_every_micro_batch()) rounds = over_ranks(rounds, ReduceOp::max);
  return static_cast<std::size_t>(rounds);
}

float Engine::over_ranks(float value, ReduceOp op) {
  if (communicator_.world_size() == 1) return value;
  // loss_ is free until the first forward pass.
  const Tensor host{&value, DType::f32, loss_.shape, Device::cpu};
  backend_->copy(host, loss_);
  communicator_.all_reduce(loss_, op);
  backend_->copy(loss_, host);
  return value;
}

double Engine::count_samples(std::span<const Batch> micro_batches) {
  float samples = 0;
  for (const Batch& batch : micro_batches) samples += static_cast<float>(batch.num_sequences());
  samples = over_ranks(samples, ReduceOp::sum);
  check<ShapeError>(samples > 0, "train_batch: no rank has a sample; expected at least one");
  return samples;
}

void Engine::prepare_evaluation() {
  const Tensor weights = updater_.evaluation_weights();
  if (binding_ == Binding::evaluation && evaluated_ == weights.data) return;
  model_->bind(store().views(weights), {});
  binding_ = Binding::evaluation;
  evaluated_ = weights.data;
}

Evaluation Engine::evaluate(const Batch& batch) {
  prepare_evaluation();
  model_->forward(batch, {Mode::evaluate, 0, 0});
  Evaluation result;
  result.logits = floats_on_host(*backend_, model_->logits());
  result.logits_shape = model_->logits().shape;
  if (model_->loss()) result.loss = floats_on_host(*backend_, model_->loss()).front();
  return result;
}

}  // namespace bitfall
