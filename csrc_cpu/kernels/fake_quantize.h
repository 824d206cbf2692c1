// Kernels of fake quantization: the passes over one chunk of one group. The arithmetic is in
// quantizer/quant_math.h; results are equal bit for bit on every instruction set.
#pragma once

#include <cstdint>

#include "core/quant_spec.h"
#include "core/tensor.h"
#include "quantizer/quant_math.h"

namespace bitfall {

/// Consecutive elements of one group, and how to quantize them.
struct QuantizeChunk {
  const float* master = nullptr;
  void* working = nullptr;  ///< f32, bf16 or f16; may be the memory of an f32 master
  DType dtype = DType::f32;
  std::int64_t numel = 0;
  std::int64_t element = 0;  ///< index of master[0] in its parameter, for stochastic rounding
  QuantSpec spec;
  QuantGroup group;
  StochasticKey key;
  float mix = 0.0f;  ///< share of the unquantized weight
};

struct FakeQuantizeKernels {
  /// Widens `range` by n elements.
  void (*widen_range)(const float* x, std::int64_t n, QuantRange& range);
  /// Magnitudes above `threshold` of one chunk, n <= kQuantSumChunk, summed in the order that
  /// quant_math.h states.
  MagnitudeSum (*magnitude_sum)(const float* x, std::int64_t n, float threshold);
  /// working = blend(mix, master, quantized master).
  void (*quantize)(const QuantizeChunk& chunk);
};

}  // namespace bitfall
