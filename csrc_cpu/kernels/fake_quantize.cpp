#include "csrc_cpu/kernels/fake_quantize.h"

namespace bitfall::BITFALL_ISA {
namespace {

void widen_range(const float* x, std::int64_t n, QuantRange& range) {
  std::int32_t min_key = range.min_key, max_key = range.max_key;
#pragma omp simd reduction(min : min_key) reduction(max : max_key)
  for (std::int64_t i = 0; i < n; ++i) {
    const std::int32_t key = order_key(x[i]);
    min_key = key < min_key ? key : min_key;
    max_key = key > max_key ? key : max_key;
  }
  range.min_key = min_key;
  range.max_key = max_key;
}

MagnitudeSum magnitude_sum(const float* x, std::int64_t n, float threshold) {
  double sums[kQuantSumLanes] = {};
  std::int32_t count = 0;
  for (std::int64_t row = 0; row < n; row += kQuantSumLanes) {
    const std::int64_t lanes = n - row < kQuantSumLanes ? n - row : kQuantSumLanes;
#pragma omp simd reduction(+ : count)
    for (std::int64_t lane = 0; lane < lanes; ++lane) {
      const float value = magnitude(x[row + lane]);
      sums[lane] += static_cast<double>(value > threshold ? value : 0.0f);
      count += value > threshold ? 1 : 0;
    }
  }
  for (int half = kQuantSumLanes / 2; half > 0; half /= 2) {
    for (int lane = 0; lane < half; ++lane) sums[lane] += sums[lane + half];
  }
  return {sums[0], count};
}

template <typename T>
void quantize_sign(const QuantizeChunk& chunk) {
  const QuantGroup group = chunk.group;
  const float mix = chunk.mix;
  const float* master = chunk.master;
  T* working = static_cast<T*>(chunk.working);
#pragma omp simd
  for (std::int64_t i = 0; i < chunk.numel; ++i) {
    const float value = dequantize(sign_code(master[i], group), group);
    working[i] = from_float<T>(blend(mix, master[i], value));
  }
}

template <typename T>
void quantize_nearest(const QuantizeChunk& chunk) {
  const QuantGroup group = chunk.group;
  const CodeLimits limits(chunk.spec.bits, chunk.spec.q_type);
  const float mix = chunk.mix;
  const float* master = chunk.master;
  T* working = static_cast<T*>(chunk.working);
#pragma omp simd
  for (std::int64_t i = 0; i < chunk.numel; ++i) {
    const float value = dequantize(uniform_code(master[i], group, limits, 0.0f), group);
    working[i] = from_float<T>(blend(mix, master[i], value));
  }
}

/// Offsets of all elements of one stochastic block, sixteen Philox blocks at a time.
void stochastic_offsets(const StochasticKey& key, std::int64_t block, float* offsets) {
#pragma omp simd
  for (std::uint32_t lane = 0; lane < 16; ++lane) {
    const PhiloxBlock random = stochastic_block(key, block, lane);
    for (int word = 0; word < 4; ++word) {
      offsets[32 * word + lane] = stochastic_offset(random.word[word] & 0xffffu);
      offsets[32 * word + 16 + lane] = stochastic_offset(random.word[word] >> 16);
    }
  }
}

template <typename T>
void quantize_stochastic(const QuantizeChunk& chunk) {
  const QuantGroup group = chunk.group;
  const CodeLimits limits(chunk.spec.bits, chunk.spec.q_type);
  const float mix = chunk.mix;
  alignas(64) float offsets[kStochasticBlock];
  for (std::int64_t begin = 0; begin < chunk.numel;) {
    // A chunk may begin inside a block of the parameter, and end in one.
    const std::int64_t first = (chunk.element + begin) % kStochasticBlock;
    const std::int64_t rest = chunk.numel - begin;
    const std::int64_t n = kStochasticBlock - first < rest ? kStochasticBlock - first : rest;
    stochastic_offsets(chunk.key, (chunk.element + begin) / kStochasticBlock, offsets);
    const float* master = chunk.master + begin;
    const float* offset = offsets + first;
    T* working = static_cast<T*>(chunk.working) + begin;
#pragma omp simd
    for (std::int64_t i = 0; i < n; ++i) {
      const float value = dequantize(uniform_code(master[i], group, limits, offset[i]), group);
      working[i] = from_float<T>(blend(mix, master[i], value));
    }
    begin += n;
  }
}

template <typename T>
void quantize_as(const QuantizeChunk& chunk) {
  if (is_sign_quantized(chunk.spec.bits)) {
    quantize_sign<T>(chunk);
  } else if (chunk.spec.rounding == Rounding::nearest) {
    quantize_nearest<T>(chunk);
  } else {
    quantize_stochastic<T>(chunk);
  }
}

void quantize(const QuantizeChunk& chunk) {
  switch (chunk.dtype) {
    case DType::f32:
      return quantize_as<float>(chunk);
    case DType::bf16:
      return quantize_as<BFloat16>(chunk);
    case DType::f16:
      return quantize_as<Float16>(chunk);
    default:
      return;  // the operation admits floating dtypes only
  }
}

}  // namespace

extern const FakeQuantizeKernels fake_quantize_kernels;
const FakeQuantizeKernels fake_quantize_kernels{widen_range, magnitude_sum, quantize};

}  // namespace bitfall::BITFALL_ISA
