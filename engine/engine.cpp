#include "engine/engine.h"

#include <algorithm>
#include <cmath>

#include "core/error.h"
#include "engine/eigenvalue_boundary.h"
#include "engine/layer_names.h"

namespace bitfall {
namespace {

ParameterStore::WorkingCopy working_copy(const Config& config) {
  const bool shared = config.compute_dtype == DType::f32 && !config.quantize.enabled;
  return shared ? ParameterStore::WorkingCopy::shared : ParameterStore::WorkingCopy::separate;
}

/// Ranges of the flat buffers that belong to no block.
std::vector<FlatRange> outside_of_blocks(const ParameterStore& store) {
  std::vector<FlatRange> ranges;
  std::int64_t begin = 0;
  const auto add_until = [&](std::int64_t end) {
    if (end > begin) ranges.push_back({begin, end - begin});
  };
  for (int block = 0; block < store.num_blocks(); ++block) {
    const FlatRange range = store.block_range(block);
    add_until(range.begin);
    begin = range.begin + range.numel;
  }
  add_until(store.numel());
  return ranges;
}

double to_host(Backend& backend, const Tensor& scalar) {
  float value = 0;
  backend.copy(scalar, Tensor{&value, DType::f32, scalar.shape, Device::cpu});
  return value;
}

int width(DType dtype) { return dtype == DType::f32 ? 32 : 16; }

}  // namespace

Engine::Engine(std::unique_ptr<Backend> backend, std::unique_ptr<Model> model,
               Communicator& communicator, const CompletedConfig& config,
               const LoadWeights& load_weights)
    : communicator_(communicator),
      config_(config),
      backend_(std::move(backend)),
      model_(std::move(model)),
      store_(*backend_, model_->parameters(), this->config().compute_dtype,
             working_copy(this->config())),
      optimizer_(*backend_, store_, this->config().optimizer),
      loss_scaler_(this->config().loss_scale),
      lr_schedule_(this->config().scheduler, this->config().optimizer.lr),
      unblocked_(outside_of_blocks(store_)),
      loss_buffer_(backend_->allocate(sizeof(float))),
      loss_(loss_buffer_.view(DType::f32, Shape{1})) {
  const Config& values = this->config();
  if (values.quantize.enabled) {
    const std::string path = layer_path(store_.parameters());
    check_layers(values.eigenvalue, path, store_.num_blocks());
    bit_schedule_ = std::make_unique<BitSchedule>(
        values.quantize, bitfall::bit_states(values.quantize, store_.parameters(), path),
        values.eigenvalue.enabled ? store_.num_blocks() : 0);
    quantizer_ = std::make_unique<Quantizer>(values.quantize, store_, *bit_schedule_, values.seed);
    eigenvalues_ = std::make_unique<EigenvalueBoundary>(values.eigenvalue, values.seed, *backend_,
                                                        communicator_, *model_, store_);
  }
  load_weights(*backend_, store_);
  broadcast_weights();
  publish_weights();
}

Engine::~Engine() = default;

void Engine::broadcast_weights() {
  if (communicator_.world_size() == 1) return;
  std::vector<std::byte> bytes;
  for (std::size_t index = 0; index < store_.parameters().size(); ++index) {
    const Tensor master = store_.master(index);
    bytes.resize(master.bytes());
    const Tensor host{bytes.data(), DType::f32, master.shape, Device::cpu};
    backend_->copy(master, host);
    communicator_.broadcast(bytes, 0);
    backend_->copy(host, master);
  }
}

std::vector<BitStateSpec> Engine::bit_states() const {
  return bit_schedule_ ? bit_schedule_->specs() : std::vector<BitStateSpec>{};
}

std::vector<int> Engine::bits_per_state() const {
  std::vector<int> bits;
  for (std::size_t state = 0; state < bit_states().size(); ++state) {
    bits.push_back(bit_schedule_->quantizing() ? bit_schedule_->bits(state)
                                               : width(config().compute_dtype));
  }
  return bits;
}

StepResult Engine::train_batch(std::span<const Batch> micro_batches) {
  const auto most = static_cast<std::size_t>(config().gradient_accumulation_steps);
  check<ShapeError>(micro_batches.size() <= most, "train_batch: ", micro_batches.size(),
                    " micro-batches, expected at most gradient_accumulation_steps = ", most);
  bind_training();
  StepResult result;
  result.loss = accumulate_gradients(micro_batches);
  result.loss_scale = loss_scaler_.scale();
  result.learning_rate = lr_schedule_.rate(state_.global_step);
  result.grad_norm = timer_.measure("update", [&] { return gradient_norm(); });
  ++state_.boundaries;
  if (!std::isfinite(result.grad_norm)) return skip_step(std::move(result));

  const std::vector<double> eigenvalues = compute_eigenvalues(micro_batches, result);
  if (bit_schedule_) result.drops = bit_schedule_->advance(state_.global_step + 1, eigenvalues);
  if (!result.drops.empty()) check_ranks_agree_on_bits();
  update(result);
  publish_weights();
  result.step = state_.global_step;
  result.bits = bits_per_state();
  return result;
}

void Engine::bind_training() {
  evaluation_buffer_ = Buffer();  // memory of evaluations is not kept during training
  if (binding_ == Binding::training) return;
  model_->bind(store_.views(store_.working()), store_.views(store_.gradient()));
  binding_ = Binding::training;
}

double Engine::accumulate_gradients(std::span<const Batch> micro_batches) {
  // Weights of micro-batches for which the mean over ranks is the mean over all samples.
  const double per_sample = communicator_.world_size() / count_samples(micro_batches);
  // A skipped step draws new dropout masks, so it counts here.
  const auto dropout_step = static_cast<std::uint32_t>(state_.global_step + state_.skipped_steps);
  const ForwardContext context{Mode::train, config().seed, dropout_step};
  for (std::size_t i = 0; i < micro_batches.size(); ++i) {
    timer_.measure("forward", [&] { model_->forward(micro_batches[i], context); });
    check<ShapeError>(static_cast<bool>(model_->loss()), "train_batch: micro-batch ", i,
                      " has no labels; training needs them");
    const double share = per_sample * static_cast<double>(micro_batches[i].num_sequences());
    backend_->axpby(static_cast<float>(share), model_->loss(), i == 0 ? 0.0f : 1.0f, loss_);
    const bool is_last = i + 1 == micro_batches.size();
    timer_.measure("backward", [&] {
      const auto scale = static_cast<float>(loss_scaler_.scale() * share);
      model_->backward(scale, i == 0 ? Accumulate::no : Accumulate::yes, [&](int block) {
        if (is_last) start_reduction(block);
      });
    });
  }
  if (micro_batches.empty()) contribute_nothing();
  timer_.measure("all_reduce", [&] {
    communicator_.all_reduce_async(loss_, ReduceOp::mean);
    communicator_.wait_all();
  });
  return to_host(*backend_, loss_);
}

double Engine::count_samples(std::span<const Batch> micro_batches) {
  float samples = 0;
  for (const Batch& batch : micro_batches) samples += static_cast<float>(batch.num_sequences());
  if (communicator_.world_size() > 1) {
    backend_->copy(Tensor{&samples, DType::f32, loss_.shape, Device::cpu}, loss_);
    communicator_.all_reduce(loss_, ReduceOp::sum);
    samples = static_cast<float>(to_host(*backend_, loss_));
  }
  check<ShapeError>(samples > 0, "train_batch: no rank has a sample; expected at least one");
  return samples;
}

void Engine::contribute_nothing() {
  backend_->fill_zero(loss_);
  backend_->fill_zero(store_.gradient());
  for (int block = store_.num_blocks() - 1; block >= 0; --block) start_reduction(block);
  start_reduction(kNoBlock);
}

void Engine::start_reduction(int block) {
  const auto reduce = [this](const FlatRange& range) {
    communicator_.all_reduce_async(store_.gradient().flat_slice(range.begin, range.numel),
                                   ReduceOp::mean);
  };
  if (block != kNoBlock) return reduce(store_.block_range(block));
  for (const FlatRange& range : unblocked_) reduce(range);
}

double Engine::gradient_norm() {
  return std::sqrt(backend_->squared_sum(store_.gradient())) / loss_scaler_.scale();
}

StepResult Engine::skip_step(StepResult result) {
  if (config().compute_dtype != DType::f16) refuse_gradient(result.loss);
  loss_scaler_.on_overflow();
  ++state_.skipped_steps;
  result.step = state_.global_step;
  result.skipped = true;
  result.bits = bits_per_state();
  return result;
}

void Engine::refuse_gradient(double loss) const {
  const std::vector<Parameter>& parameters = store_.parameters();
  std::size_t index = 0;
  while (index + 1 < parameters.size() &&
         std::isfinite(backend_->squared_sum(store_.gradient(index)))) {
    ++index;
  }
  throw TrainingError(concat("step ", state_.global_step + 1, ": the gradient of '",
                             parameters[index].name, "' is not finite (loss ", loss,
                             "); no weight was changed. Lower the learning rate, set "
                             "gradient_clipping, or look for broken values in the data"));
}

std::vector<double> Engine::compute_eigenvalues(std::span<const Batch> micro_batches,
                                                StepResult& result) {
  std::vector<double> normalized;
  if (!bit_schedule_ || !eigenvalues_due(config().eigenvalue, *bit_schedule_, state_.boundaries)) {
    return normalized;
  }
  timer_.measure("eigenvalues", [&] {
    result.eigenvalues = eigenvalues_->compute(micro_batches, state_.global_step + 1);
  });
  for (const EigenvalueResult& eigenvalue : result.eigenvalues) {
    normalized.push_back(eigenvalue.normalized);
  }
  return normalized;
}

void Engine::update(StepResult& result) {
  // The 1e-6 is DeepSpeed's and PyTorch's.
  const double clipping = config().gradient_clipping;
  const double clip = clipping > 0 ? std::min(1.0, clipping / (result.grad_norm + 1e-6)) : 1.0;
  timer_.measure("update", [&] {
    optimizer_.step(store_, result.learning_rate, clip / loss_scaler_.scale());
  });
  loss_scaler_.on_success();
  ++state_.global_step;
}

void Engine::publish_weights() {
  timer_.measure("quantize", [&] {
    if (quantizer_) {
      quantizer_->publish(*backend_, store_, state_.global_step);
    } else if (!store_.working_is_master()) {
      backend_->cast(store_.master(), store_.working());
    }
  });
}

void Engine::check_ranks_agree_on_bits() const {
  if (communicator_.world_size() == 1) return;
  const std::vector<int> bits = bits_per_state();
  const auto view = std::as_bytes(std::span(bits));
  const std::vector<std::byte> mine(view.begin(), view.end());
  for (const std::vector<std::byte>& other : communicator_.all_gather(mine)) {
    check<CommunicationError>(other == mine, "step ", state_.global_step + 1, ", rank ",
                              communicator_.rank(),
                              ": the ranks disagree on the bits of their layers; this is a bug");
  }
}

std::map<std::string, double> Engine::timings() {
  std::map<std::string, double> seconds = {{"forward", 0}, {"backward", 0}, {"all_reduce", 0},
                                           {"update", 0},  {"quantize", 0}, {"eigenvalues", 0}};
  for (const auto& [phase, value] : timer_.take()) seconds[phase] = value;
  return seconds;
}

}  // namespace bitfall
