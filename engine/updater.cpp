#include "engine/updater.h"

#include <algorithm>
#include <cmath>

#include "core/error.h"
#include "engine/layer_names.h"

namespace bitfall {
namespace {

int width(DType dtype) { return dtype == DType::f32 ? 32 : 16; }

}  // namespace

Updater::Updater(Backend& backend, Communicator& communicator, const CompletedConfig& config,
                 const std::vector<ParameterSpec>& parameters, const LoadWeights& load_weights,
                 UpdateRule rule)
    : backend_(backend),
      communicator_(communicator),
      config_(config),
      store_(load_store(backend, communicator, this->config(), parameters, load_weights)),
      reducer_(backend, communicator, store_),
      decision_buffer_(backend.allocate(sizeof(UpdateDecision))),
      decision_(decision_buffer_.view(DType::s8, Shape{sizeof(UpdateDecision)})),
      loss_scaler_(this->config().loss_scale) {
  const Config& values = this->config();
  if (rule.kind == UpdateRule::Kind::schedule) {
    lr_schedule_.emplace(values.scheduler, values.optimizer.lr);
    rule.groups = default_groups(store_, values.optimizer);
  }
  if (rule.kind != UpdateRule::Kind::caller) {
    optimizer_.emplace(backend, store_, values.optimizer, std::move(rule.groups));
  }
  if (values.quantize.enabled) {
    const std::string path = layer_path(store_.parameters());
    check_layers(values.eigenvalue, path, store_.num_blocks());
    bit_schedule_ = std::make_unique<BitSchedule>(
        values.quantize, bitfall::bit_states(values.quantize, store_.parameters(), path),
        values.eigenvalue.enabled ? store_.num_blocks() : 0);
    quantizer_ = std::make_unique<Quantizer>(values.quantize, store_, *bit_schedule_, values.seed);
    eigenvalues_ = std::make_unique<EigenvalueBoundary>(values.eigenvalue, values.seed, backend,
                                                        communicator, store_);
  }
  publish_weights(state_.global_step);
}

std::vector<BitStateSpec> Updater::bit_states() const {
  return bit_schedule_ ? bit_schedule_->specs() : std::vector<BitStateSpec>{};
}

std::vector<int> Updater::bits_per_state() const {
  std::vector<int> bits;
  for (std::size_t state = 0; state < bit_states().size(); ++state) {
    bits.push_back(bit_schedule_->quantizing() ? bit_schedule_->bits(state)
                                               : width(config().compute_dtype));
  }
  return bits;
}

void Updater::contribute_nothing(Accumulate accumulate) {
  for (int block = store_.num_blocks() - 1; block >= 0; --block) {
    reducer_.start_with_zeros(block, accumulate);
  }
  reducer_.start_with_zeros(kNoBlock, accumulate);
}

bool Updater::needs_eigenvalues() const {
  return bit_schedule_ &&
         eigenvalues_due(config().eigenvalue, *bit_schedule_, state_.boundaries + 1);
}

StepResult Updater::step(const Tensor& loss, const MakeHessian& make_hessian,
                         const UpdateMasters& update_masters) {
  const bool needs_eigenvalues = this->needs_eigenvalues();
  timer_.measure("all_reduce", [&] {
    communicator_.all_reduce_async(loss, ReduceOp::mean);
    reducer_.finish();
  });
  StepResult result;
  result.loss_scale = loss_scaler_.scale();
  if (lr_schedule_) optimizer_->set_learning_rate(lr_schedule_->rate(state_.global_step));
  if (optimizer_) result.learning_rate = optimizer_->groups().front().learning_rate;
  ++state_.boundaries;
  timer_.measure("update", [&] {
    reducer_.decide_update(loss, {result.loss_scale, config().gradient_clipping}, decision_);
  });
  // Products cost too much to be in vain, and what the caller does cannot be taken back.
  const bool host_decides = needs_eigenvalues || !optimizer_;
  if (host_decides && is_skipped(result)) return skip_step(std::move(result));

  std::vector<double> eigenvalues;
  if (needs_eigenvalues) eigenvalues = compute_eigenvalues(make_hessian, result);
  const Undo undo = this->undo();
  if (bit_schedule_) result.drops = bit_schedule_->advance(state_.global_step + 1, eigenvalues);
  if (!result.drops.empty()) check_ranks_agree_on_bits();
  update(update_masters);
  // The device has its work; it changes no master if it decided to skip the step.
  if (!host_decides && is_skipped(result)) {
    take_back(undo, result);
    return skip_step(std::move(result));
  }
  loss_scaler_.on_success();
  result.step = ++state_.global_step;
  result.bits = bits_per_state();
  return result;
}

bool Updater::is_skipped(StepResult& result) {
  const UpdateDecision decision =
      timer_.measure("update", [&] { return backend_.last_decision(); });
  result.loss = decision.loss;
  result.grad_norm = decision.grad_norm;
  return decision.skip != 0;
}

Updater::Undo Updater::undo() const {
  Undo undo;
  if (optimizer_) undo.optimizer_steps = optimizer_->steps();
  if (bit_schedule_) undo.bit_schedule = bit_schedule_->state();
  return undo;
}

void Updater::take_back(const Undo& undo, StepResult& result) {
  result.drops.clear();
  optimizer_->set_steps(undo.optimizer_steps);
  if (bit_schedule_) bit_schedule_->restore(undo.bit_schedule);
  publish_weights(state_.global_step);
}

StepResult Updater::skip_step(StepResult result) {
  if (config().compute_dtype != DType::f16) refuse_gradient(result.loss);
  loss_scaler_.on_overflow();
  ++state_.skipped_steps;
  result.step = state_.global_step;
  result.skipped = true;
  result.bits = bits_per_state();
  return result;
}

void Updater::refuse_gradient(double loss) const {
  const std::vector<double> norms = reducer_.squared_norms();
  const auto bad = std::find_if(norms.begin(), norms.end() - 1,
                                [](double norm) { return !std::isfinite(norm); });
  const Parameter& parameter = store_.parameters()[static_cast<std::size_t>(bad - norms.begin())];
  throw TrainingError(concat("step ", state_.global_step + 1, ": the gradient of '", parameter.name,
                             "' is not finite (loss ", loss,
                             "); no weight was changed. Lower the learning rate, set "
                             "gradient_clipping, or look for broken values in the data"));
}

std::vector<double> Updater::compute_eigenvalues(const MakeHessian& make_hessian,
                                                 StepResult& result) {
  timer_.measure("eigenvalues", [&] {
    const std::unique_ptr<HessianSource> hessian = make_hessian();
    result.eigenvalues = eigenvalues_->compute(*hessian, state_.global_step + 1);
  });
  std::vector<double> normalized;
  for (const EigenvalueResult& eigenvalue : result.eigenvalues) {
    normalized.push_back(eigenvalue.normalized);
  }
  return normalized;
}

void Updater::update(const UpdateMasters& update_masters) {
  const std::int64_t step = state_.global_step + 1;
  if (optimizer_) {
    timer_.measure("update", [&] { optimizer_->step(store_, decision_, published(step)); });
    return gather_weights();
  }
  timer_.measure("update", [&] {
    const float multiplier = backend_.last_decision().gradient_multiplier;
    const Tensor gradient = store_.gradient();
    if (multiplier != 1.0f) backend_.axpby(multiplier, gradient, 0.0f, gradient);
    update_masters();
  });
  publish_weights(step);
}

std::vector<FakeQuantizeRange> Updater::published(std::int64_t step) const {
  if (quantizer_) return quantizer_->ranges(store_, step);
  if (store_.working_is_master()) return {};
  std::vector<FakeQuantizeRange> casts;
  for (const OwnedPart& part : store_.owned_parts()) casts.push_back({part.begin, part.numel});
  return casts;
}

void Updater::publish_weights(std::int64_t step) {
  timer_.measure("update", [&] {
    if (quantizer_) {
      quantizer_->publish(backend_, store_, step);
    } else if (!store_.working_is_master()) {
      backend_.cast(store_.master(), store_.working(store_.owned()));
    }
  });
  gather_weights();
}

void Updater::gather_weights() {
  timer_.measure("all_reduce",
                 [&] { gather_slices(communicator_, store_.partition(), store_.working()); });
}

void Updater::check_ranks_agree_on_bits() const {
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

}  // namespace bitfall
