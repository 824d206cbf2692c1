#include "engine/eigenvalue_boundary.h"

#include <algorithm>
#include <cmath>

#include "core/error.h"
#include "engine/engine.h"

namespace bitfall {
namespace {

PowerIterationOptions options_of(const EigenvalueConfig& config) {
  return {config.max_iter, config.tol, config.stability};
}

/// Binds the model to scratch memory, and back to the store's when it goes out of scope.
class ScratchBinding {
 public:
  ScratchBinding(Model& model, ParameterStore& store, const Tensor& weights,
                 const Tensor& gradients)
      : model_(model), store_(store) {
    model_.bind(store_.views(weights), store_.views(gradients));
  }
  ScratchBinding(const ScratchBinding&) = delete;
  ScratchBinding& operator=(const ScratchBinding&) = delete;
  ~ScratchBinding() {
    model_.bind(store_.views(store_.working()), store_.views(store_.gradient()));
  }

 private:
  Model& model_;
  ParameterStore& store_;
};

Tensor flat_view(Backend& backend, std::int64_t numel, Buffer& buffer) {
  const std::size_t bytes = static_cast<std::size_t>(numel) * sizeof(float);
  if (buffer.bytes() < bytes) buffer = backend.allocate(bytes);
  return buffer.view(DType::f32, Shape{numel});
}

}  // namespace

bool eigenvalues_due(const EigenvalueConfig& config, const BitSchedule& schedule,
                     std::int64_t boundary) {
  return config.enabled && boundary % config.gas_boundary_resolution == 0 &&
         schedule.block_would_drop();
}

EigenvalueBoundary::EigenvalueBoundary(const EigenvalueConfig& config, std::uint64_t seed,
                                       Backend& backend, Communicator& communicator, Model& model,
                                       ParameterStore& store)
    : config_(config),
      seed_(seed),
      backend_(backend),
      communicator_(communicator),
      model_(model),
      store_(store),
      estimator_(backend, options_of(config)) {}

std::vector<EigenvalueResult> EigenvalueBoundary::compute(std::span<const Batch> micro_batches,
                                                          std::int64_t step) {
  sample_weight_ = sample_weight(micro_batches);
  const Tensor weights = f32_weights();
  const ScratchBinding binding(model_, store_, weights, gradient_scratch());
  if (micro_batches.size() == 1) model_.forward(micro_batches[0], {Mode::differentiate, 0, 0});

  // From the last block down: a product recomputes its own block and those above, so the inputs of
  // the blocks below stay those of the forward pass.
  const int count = num_blocks();
  std::vector<PowerIterationResult> blocks(static_cast<std::size_t>(count));
  DifferenceHessian hessian(backend_);
  for (int block = count - 1; block >= 0; --block) {
    blocks[static_cast<std::size_t>(block)] =
        estimate(block, step, weights, micro_batches, hessian);
  }

  std::vector<double> values;
  for (const PowerIterationResult& block : blocks) values.push_back(block.value);
  const std::vector<double> normalized = normalize_eigenvalues(values);
  std::vector<EigenvalueResult> results;
  for (int block = 0; block < count; ++block) {
    const auto index = static_cast<std::size_t>(block);
    results.push_back({concat(config_.layer_name, ".", block), block, blocks[index].iterations,
                       blocks[index].products, blocks[index].converged, std::fabs(values[index]),
                       normalized[index], eigenvalue_factor(normalized[index])});
  }
  return results;
}

int EigenvalueBoundary::num_blocks() const {
  return config_.layer_num == 0 ? store_.num_blocks()
                                : std::min(config_.layer_num, store_.num_blocks());
}

Tensor EigenvalueBoundary::f32_weights() {
  if (store_.compute_dtype() == DType::f32) return store_.working();
  const Tensor weights = flat_view(backend_, store_.numel(), weights_buffer_);
  backend_.cast(store_.working(), weights);
  return weights;
}

Tensor EigenvalueBoundary::gradient_scratch() {
  return flat_view(backend_, store_.numel(), gradient_buffer_);
}

PowerIterationResult EigenvalueBoundary::estimate(int block, std::int64_t step,
                                                  const Tensor& weights,
                                                  std::span<const Batch> micro_batches,
                                                  DifferenceHessian& hessian) {
  const FlatRange range = store_.block_range(block);
  if (!micro_batches.empty()) {
    hessian.begin_block(weights.flat_slice(range.begin, range.numel),
                        [&, block] { return gradient(block, micro_batches); });
  }
  const StartVectorKey key{seed_, static_cast<std::uint32_t>(step),
                           static_cast<std::uint32_t>(block)};
  return estimator_.estimate(key, range.numel, [&](const Tensor& v, const Tensor& product) {
    micro_batches.empty() ? backend_.fill_zero(product) : hessian(v, product);
    communicator_.all_reduce(product, ReduceOp::mean);
  });
}

Tensor EigenvalueBoundary::gradient(int block, std::span<const Batch> micro_batches) {
  const FlatRange range = store_.block_range(block);
  const Tensor gradient = gradient_scratch().flat_slice(range.begin, range.numel);
  // Kept activations belong to one micro-batch, so several are recomputed in full.
  const bool single = micro_batches.size() == 1;
  const Tensor sum = flat_view(backend_, range.numel, sum_buffer_);
  for (std::size_t i = 0; i < micro_batches.size(); ++i) {
    model_.block_gradient(micro_batches[i], block,
                          single ? Recompute::from_block : Recompute::everything);
    const double share = sample_weight_ * static_cast<double>(micro_batches[i].num_sequences());
    if (single && share == 1.0) return gradient;
    backend_.axpby(static_cast<float>(share), gradient, i == 0 ? 0.0f : 1.0f, sum);
  }
  return sum;
}

double EigenvalueBoundary::sample_weight(std::span<const Batch> micro_batches) {
  float samples = 0;
  for (const Batch& batch : micro_batches) samples += static_cast<float>(batch.num_sequences());
  if (communicator_.world_size() > 1) {
    const Tensor host{&samples, DType::f32, Shape{1}, Device::cpu};
    const Tensor sum = flat_view(backend_, 1, sum_buffer_);
    backend_.copy(host, sum);
    communicator_.all_reduce(sum, ReduceOp::sum);
    backend_.copy(sum, host);
  }
  check<ShapeError>(samples > 0, "eigenvalues: no rank has a sample; expected at least one");
  return communicator_.world_size() / static_cast<double>(samples);
}

}  // namespace bitfall
