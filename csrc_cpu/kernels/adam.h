// Kernels over flat f32 vectors: the Adam update, sums and linear combinations.
#pragma once

#include <cstdint>

#include "core/backend.h"

namespace bitfall {

/// Equal parts of the four flat buffers of the optimizer.
struct AdamSlice {
  const float* gradient = nullptr;
  float* master = nullptr;
  float* exp_avg = nullptr;
  float* exp_avg_sq = nullptr;
  std::int64_t numel = 0;
};

struct AdamKernels {
  /// The gradient counts times `multiplier`.
  void (*update)(const AdamStep& step, float multiplier, const AdamSlice& slice);
  /// Sum of x[i] * y[i] in f64, in an order that depends on n alone.
  double (*dot)(const float* x, const float* y, std::int64_t n);
  /// y = alpha * x + beta * y; with beta = 0, y is not read.
  void (*axpby)(float alpha, const float* x, float beta, float* y, std::int64_t n);
};

}  // namespace bitfall
