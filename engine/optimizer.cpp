#include "engine/optimizer.h"

#include <algorithm>
#include <cctype>
#include <cmath>
#include <string>

#include "core/error.h"

namespace bitfall {
namespace {

void check_covers(const ParameterStore& store, const std::vector<ParameterGroup>& groups) {
  std::vector<int> count(store.parameters().size());
  for (const ParameterGroup& group : groups) {
    for (const std::size_t index : group.parameters) ++count.at(index);
  }
  for (std::size_t index = 0; index < count.size(); ++index) {
    check<ConfigError>(count[index] == 1, "optimizer: parameter '", store.parameters()[index].name,
                       "' is in ", count[index], " parameter groups, expected one");
  }
}

void check_numbers(const ParameterGroup& group, std::size_t index) {
  const auto check_one = [index](const char* name, double value, bool good, const char* expected) {
    check<ConfigError>(good, "optimizer: ", name, " of parameter group ", index, " = ", value,
                       ": expected ", expected);
  };
  const auto in = [](double value, double low) { return std::isfinite(value) && value >= low; };
  check_one("lr", group.learning_rate, in(group.learning_rate, 0), "a finite number, 0 or more");
  check_one("weight_decay", group.weight_decay, in(group.weight_decay, 0),
            "a finite number, 0 or more");
  check_one("eps", group.eps, in(group.eps, 0), "a finite number, 0 or more");
  for (const double beta : group.betas) check_one("betas", beta, in(beta, 0) && beta < 1, "0 to 1");
}

float bias_correction(double beta, std::int64_t steps) {
  return static_cast<float>(1.0 - std::pow(beta, static_cast<double>(steps)));
}

}  // namespace

bool decays(std::string_view parameter_name) {
  std::string lower(parameter_name);
  std::transform(lower.begin(), lower.end(), lower.begin(),
                 [](unsigned char c) { return static_cast<char>(std::tolower(c)); });
  return lower.find("bias") == std::string::npos && lower.find("layernorm") == std::string::npos;
}

std::vector<ParameterGroup> default_groups(const ParameterStore& store,
                                           const OptimizerConfig& config) {
  ParameterGroup decaying{{}, config.lr, config.weight_decay, config.betas, config.eps};
  ParameterGroup spared{{}, config.lr, 0.0, config.betas, config.eps};
  for (std::size_t index = 0; index < store.parameters().size(); ++index) {
    (decays(store.parameters()[index].name) ? decaying : spared).parameters.push_back(index);
  }
  return {std::move(decaying), std::move(spared)};
}

Optimizer::Optimizer(Backend& backend, const ParameterStore& store, const OptimizerConfig& config,
                     std::vector<ParameterGroup> groups)
    : backend_(backend), config_(config), groups_(std::move(groups)) {
  check_covers(store, groups_);
  set_numbers(groups_);
  group_of_.resize(store.parameters().size());
  for (std::size_t i = 0; i < groups_.size(); ++i) {
    for (const std::size_t parameter : groups_[i].parameters) group_of_[parameter] = i;
  }
  const std::int64_t numel = store.owned().numel;
  const auto bytes = static_cast<std::size_t>(numel) * size_in_bytes(DType::f32);
  exp_avg_buffer_ = backend.allocate(bytes);
  exp_avg_sq_buffer_ = backend.allocate(bytes);
  exp_avg_ = exp_avg_buffer_.view(DType::f32, Shape{numel});
  exp_avg_sq_ = exp_avg_sq_buffer_.view(DType::f32, Shape{numel});
}

void Optimizer::set_learning_rate(double learning_rate) {
  for (ParameterGroup& group : groups_) group.learning_rate = learning_rate;
}

void Optimizer::set_numbers(const std::vector<ParameterGroup>& groups) {
  check<ConfigError>(groups.size() == groups_.size(), "optimizer: ", groups.size(),
                     " parameter groups, expected the ", groups_.size(), " it was made with");
  for (std::size_t i = 0; i < groups.size(); ++i) check_numbers(groups[i], i);
  for (std::size_t i = 0; i < groups.size(); ++i) {
    groups_[i].learning_rate = groups[i].learning_rate;
    groups_[i].weight_decay = groups[i].weight_decay;
    groups_[i].betas = groups[i].betas;
    groups_[i].eps = groups[i].eps;
  }
}

AdamStep Optimizer::adam_step(const ParameterGroup& group) const {
  AdamStep step;
  step.learning_rate = static_cast<float>(group.learning_rate);
  step.beta1 = static_cast<float>(group.betas[0]);
  step.beta2 = static_cast<float>(group.betas[1]);
  step.epsilon = static_cast<float>(group.eps);
  step.weight_decay = static_cast<float>(group.weight_decay);
  step.adam_w_mode = config_.adam_w_mode;
  if (config_.bias_correction) {
    step.bias_correction1 = bias_correction(group.betas[0], steps_);
    step.bias_correction2 = bias_correction(group.betas[1], steps_);
  }
  return step;
}

void Optimizer::step(const ParameterStore& store, const Tensor& decision,
                     std::span<const FakeQuantizeRange> published) {
  ++steps_;
  std::vector<AdamStep> steps;
  for (const ParameterGroup& group : groups_) steps.push_back(adam_step(group));
  std::vector<AdamRange> ranges;
  for (const OwnedPart& part : store.owned_parts()) {
    ranges.push_back({part.begin, part.numel, steps[group_of_[part.parameter]]});
  }
  const FlatRange owned = store.owned();
  backend_.adam_update(ranges,
                       {decision, store.gradient(owned), store.master(), exp_avg_, exp_avg_sq_},
                       published, store.working(owned));
}

}  // namespace bitfall
