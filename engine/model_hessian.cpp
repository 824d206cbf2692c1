#include "engine/model_hessian.h"

#include <algorithm>

#include "core/error.h"

namespace bitfall {
namespace {

Buffer allocate_floats(Backend& backend, std::int64_t numel) {
  return backend.allocate(static_cast<std::size_t>(numel) * sizeof(float));
}

}  // namespace

ModelHessian::ModelHessian(Backend& backend, Communicator& communicator, Model& model,
                           const ParameterStore& store, std::vector<Tensor> bound_gradients,
                           std::span<const Batch> micro_batches)
    : backend_(backend),
      model_(model),
      store_(store),
      micro_batches_(micro_batches),
      weights_(f32_weights()),
      sample_weight_(sample_weight(communicator)),
      binding_(model, store, std::move(bound_gradients), weights_) {
  // What the model keeps belongs to one micro-batch: of several, each is prepared again for each
  // product.
  if (micro_batches_.size() == 1) prepare(0);
}

ModelHessian::Binding::Binding(Model& model, const ParameterStore& store,
                               std::vector<Tensor> bound_gradients, const Tensor& weights)
    : model_(model), store_(store), bound_gradients_(std::move(bound_gradients)) {
  model_.bind(store_.views(weights), {});
}

ModelHessian::Binding::~Binding() { model_.bind(store_.views(store_.working()), bound_gradients_); }

Tensor ModelHessian::f32_weights() {
  if (store_.compute_dtype() == DType::f32) return store_.working();
  weights_buffer_ = allocate_floats(backend_, store_.numel());
  const Tensor weights = weights_buffer_.view(DType::f32, Shape{store_.numel()});
  backend_.cast(store_.working(), weights);
  return weights;
}

void ModelHessian::prepare(std::size_t micro_batch) {
  const Batch& batch = micro_batches_[micro_batch];
  const double share = sample_weight_ * static_cast<double>(batch.num_sequences());
  model_.prepare_hessian(batch, static_cast<float>(share));
}

void ModelHessian::multiply(const Tensor& v, const Tensor& product) {
  // Gaps between parameters stay zero.
  backend_.fill_zero(product);
  const std::vector<Tensor> direction = store_.block_views(block_, v);
  const std::vector<Tensor> result = store_.block_views(block_, product);
  if (micro_batches_.size() == 1) return model_.hessian_product(block_, direction, result);

  const auto bytes = static_cast<std::size_t>(product.numel()) * sizeof(float);
  if (part_buffer_.bytes() < bytes) part_buffer_ = allocate_floats(backend_, product.numel());
  const Tensor part = part_buffer_.view(DType::f32, product.shape);
  backend_.fill_zero(part);
  for (std::size_t i = 0; i < micro_batches_.size(); ++i) {
    prepare(i);
    model_.hessian_product(block_, direction, store_.block_views(block_, part));
    backend_.axpby(1.0f, part, 1.0f, product);
  }
}

double ModelHessian::sample_weight(Communicator& communicator) {
  float samples = 0;
  for (const Batch& batch : micro_batches_) samples += static_cast<float>(batch.num_sequences());
  if (communicator.world_size() > 1) {
    const Buffer buffer = allocate_floats(backend_, 1);
    const Tensor host{&samples, DType::f32, Shape{1}, Device::cpu};
    const Tensor sum = buffer.view(DType::f32, Shape{1});
    backend_.copy(host, sum);
    communicator.all_reduce(sum, ReduceOp::sum);
    backend_.copy(sum, host);
  }
  check<ShapeError>(samples > 0, "eigenvalues: no rank has a sample; expected at least one");
  return communicator.world_size() / static_cast<double>(samples);
}

}  // namespace bitfall
