#include "engine/optimizer.h"

#include <algorithm>
#include <cctype>
#include <cmath>
#include <string>

namespace bitfall {
namespace {

/// Ranges of equal decay that cover the flat buffers; gaps hold zeros and go with their neighbour.
std::vector<DecayRange> decay_ranges(const ParameterStore& store, double weight_decay) {
  std::vector<DecayRange> ranges;
  for (const Parameter& parameter : store.parameters()) {
    const float decay = decays(parameter.name) ? static_cast<float>(weight_decay) : 0.0f;
    if (ranges.empty() || ranges.back().weight_decay != decay) {
      const std::int64_t begin = ranges.empty() ? 0 : parameter.offset;
      ranges.push_back({begin, 0, decay});
    }
    ranges.back().numel = parameter.offset + parameter.numel - ranges.back().begin;
  }
  return ranges;
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

Optimizer::Optimizer(Backend& backend, const ParameterStore& store, const OptimizerConfig& config)
    : backend_(backend), config_(config), ranges_(decay_ranges(store, config.weight_decay)) {
  const auto bytes = static_cast<std::size_t>(store.numel()) * size_in_bytes(DType::f32);
  exp_avg_buffer_ = backend.allocate(bytes);
  exp_avg_sq_buffer_ = backend.allocate(bytes);
  exp_avg_ = exp_avg_buffer_.view(DType::f32, Shape{store.numel()});
  exp_avg_sq_ = exp_avg_sq_buffer_.view(DType::f32, Shape{store.numel()});
}

void Optimizer::step(const ParameterStore& store, double learning_rate,
                     double gradient_multiplier) {
  ++steps_;
  AdamStep step;
  step.learning_rate = static_cast<float>(learning_rate);
  step.beta1 = static_cast<float>(config_.betas[0]);
  step.beta2 = static_cast<float>(config_.betas[1]);
  step.epsilon = static_cast<float>(config_.eps);
  step.adam_w_mode = config_.adam_w_mode;
  step.gradient_multiplier = static_cast<float>(gradient_multiplier);
  if (config_.bias_correction) {
    step.bias_correction1 = bias_correction(config_.betas[0], steps_);
    step.bias_correction2 = bias_correction(config_.betas[1], steps_);
  }
  backend_.adam_update(step, ranges_, store.gradient(), store.master(), exp_avg_, exp_avg_sq_);
}

}  // namespace bitfall
