#include "csrc_cpu/kernels/adam.h"

namespace bitfall::BITFALL_ISA {
namespace {

/// The two ways of weight decay, both as DeepSpeed's FusedAdam computes them.
enum class Decay { l2, decoupled };

template <Decay decay>
void update_with(const AdamStep& step, float multiplier, const AdamSlice& slice) {
  const float learning_rate = step.learning_rate, weight_decay = step.weight_decay;
  const float beta1 = step.beta1, rest1 = 1.0f - step.beta1;
  const float beta2 = step.beta2, rest2 = 1.0f - step.beta2;
  const float correction1 = step.bias_correction1, correction2 = step.bias_correction2;
  const float epsilon = step.epsilon;
  const float* __restrict gradient = slice.gradient;
  float* __restrict master = slice.master;
  float* __restrict exp_avg = slice.exp_avg;
  float* __restrict exp_avg_sq = slice.exp_avg_sq;
#pragma omp simd
  for (std::int64_t i = 0; i < slice.numel; ++i) {
    const float weight = master[i];
    float g = gradient[i] * multiplier;
    if constexpr (decay == Decay::l2) g += weight_decay * weight;
    const float m = beta1 * exp_avg[i] + rest1 * g;
    const float v = beta2 * exp_avg_sq[i] + rest2 * g * g;
    const float denominator = __builtin_sqrtf(v / correction2) + epsilon;
    float change = (m / correction1) / denominator;
    if constexpr (decay == Decay::decoupled) change += weight_decay * weight;
    exp_avg[i] = m;
    exp_avg_sq[i] = v;
    master[i] = weight - learning_rate * change;
  }
}

void update(const AdamStep& step, float multiplier, const AdamSlice& slice) {
  if (step.adam_w_mode) {
    update_with<Decay::decoupled>(step, multiplier, slice);
  } else {
    update_with<Decay::l2>(step, multiplier, slice);
  }
}

double dot(const float* x, const float* y, std::int64_t n) {
  // A fixed number of lanes, so that every instruction set adds in the same order.
  constexpr int kLanes = 32;
  double sums[kLanes] = {};
  std::int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
#pragma omp simd
    for (int lane = 0; lane < kLanes; ++lane)
      sums[lane] += static_cast<double>(x[i + lane]) * static_cast<double>(y[i + lane]);
  }
  for (int lane = 0; i < n; ++i, ++lane)
    sums[lane] += static_cast<double>(x[i]) * static_cast<double>(y[i]);
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int lane = 0; lane < half; ++lane) sums[lane] += sums[lane + half];
  }
  return sums[0];
}

void axpby(float alpha, const float* x, float beta, float* y, std::int64_t n) {
  if (beta == 0.0f) {
#pragma omp simd
    for (std::int64_t i = 0; i < n; ++i) y[i] = alpha * x[i];
    return;
  }
#pragma omp simd
  for (std::int64_t i = 0; i < n; ++i) y[i] = alpha * x[i] + beta * y[i];
}

}  // namespace

extern const AdamKernels adam_kernels;
const AdamKernels adam_kernels{update, dot, axpby};

}  // namespace bitfall::BITFALL_ISA
