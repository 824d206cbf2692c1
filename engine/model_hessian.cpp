#include "engine/model_hessian.h"

#include <algorithm>

#include "core/error.h"

namespace bitfall {
namespace {

Tensor allocate_flat(Backend& backend, std::int64_t numel, Buffer& buffer) {
  buffer = backend.allocate(static_cast<std::size_t>(numel) * sizeof(float));
  return buffer.view(DType::f32, Shape{numel});
}

std::int64_t longest_block(const ParameterStore& store) {
  std::int64_t numel = 1;
  for (int block = 0; block < store.num_blocks(); ++block) {
    numel = std::max(numel, store.block_range(block).numel);
  }
  return numel;
}

}  // namespace

ModelHessian::ModelHessian(Backend& backend, Communicator& communicator, Model& model,
                           const ParameterStore& store, std::vector<Tensor> bound_gradients,
                           std::span<const Batch> micro_batches)
    : backend_(backend),
      model_(model),
      store_(store),
      micro_batches_(micro_batches),
      difference_(backend),
      weights_(f32_weights()),
      gradient_(allocate_flat(backend, store.numel(), gradient_buffer_)),
      sum_(allocate_flat(backend, longest_block(store), sum_buffer_)),
      sample_weight_(sample_weight(communicator)),
      binding_(model, store, std::move(bound_gradients), weights_, gradient_) {
  if (micro_batches_.size() == 1) model_.forward(micro_batches_[0], {Mode::differentiate, 0, 0});
}

ModelHessian::ScratchBinding::ScratchBinding(Model& model, const ParameterStore& store,
                                             std::vector<Tensor> bound_gradients,
                                             const Tensor& weights, const Tensor& gradients)
    : model_(model), store_(store), bound_gradients_(std::move(bound_gradients)) {
  model_.bind(store_.views(weights), store_.views(gradients));
}

ModelHessian::ScratchBinding::~ScratchBinding() {
  model_.bind(store_.views(store_.working()), bound_gradients_);
}

void ModelHessian::begin_block(int block) {
  if (micro_batches_.empty()) return;
  const FlatRange range = store_.block_range(block);
  difference_.begin_block(weights_.flat_slice(range.begin, range.numel),
                          [this, block] { return gradient(block); });
}

void ModelHessian::multiply(const Tensor& v, const Tensor& product) {
  micro_batches_.empty() ? backend_.fill_zero(product) : difference_(v, product);
}

Tensor ModelHessian::f32_weights() {
  if (store_.compute_dtype() == DType::f32) return store_.working();
  const Tensor weights = allocate_flat(backend_, store_.numel(), weights_buffer_);
  backend_.cast(store_.working(), weights);
  return weights;
}

Tensor ModelHessian::gradient(int block) {
  const FlatRange range = store_.block_range(block);
  const Tensor gradient = gradient_.flat_slice(range.begin, range.numel);
  // Kept activations belong to one micro-batch, so several are recomputed in full. For a single one
  // the inputs of the blocks below stay those of the forward pass, as blocks come from the last
  // down.
  const bool single = micro_batches_.size() == 1;
  const Tensor sum = sum_.flat_slice(0, range.numel);
  for (std::size_t i = 0; i < micro_batches_.size(); ++i) {
    model_.block_gradient(micro_batches_[i], block,
                          single ? Recompute::from_block : Recompute::everything);
    const double share = sample_weight_ * static_cast<double>(micro_batches_[i].num_sequences());
    if (single && share == 1.0) return gradient;
    backend_.axpby(static_cast<float>(share), gradient, i == 0 ? 0.0f : 1.0f, sum);
  }
  return sum;
}

double ModelHessian::sample_weight(Communicator& communicator) {
  float samples = 0;
  for (const Batch& batch : micro_batches_) samples += static_cast<float>(batch.num_sequences());
  if (communicator.world_size() > 1) {
    const Tensor host{&samples, DType::f32, Shape{1}, Device::cpu};
    const Tensor sum = sum_.flat_slice(0, 1);
    backend_.copy(host, sum);
    communicator.all_reduce(sum, ReduceOp::sum);
    backend_.copy(sum, host);
  }
  check<ShapeError>(samples > 0, "eigenvalues: no rank has a sample; expected at least one");
  return communicator.world_size() / static_cast<double>(samples);
}

}  // namespace bitfall
