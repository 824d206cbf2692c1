#include "csrc_cpu/kernels/fake_quantize.h"

#include "csrc_cpu/kernels/vector.h"

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

MagnitudeSum chunk_sum(const float* x, std::int64_t n, float threshold) {
  return magnitude_sum(x, n, threshold);
}

/// Offsets of all elements of one stochastic block. [kStochasticBlock]
void stochastic_offsets(const StochasticKey& key, std::int64_t block, float* offsets) {
  // stochastic_counter of all lanes: even lanes in one set of 64-bit counters, odd ones in another.
  const PhiloxBlock counter = stochastic_counter(key, block, 0);
  const PhiloxKey philox_key = stochastic_philox_key(key);
  LongWords lane_index, none{};
  for (int lane = 0; lane < kLanes / 2; ++lane) lane_index[lane] = 2 * static_cast<unsigned>(lane);
  for (int first = 0; first < 16; first += kLanes) {
    // The counter's lanes fill its four low bits: 16 * block + lane cannot carry.
    const LongWords even = lane_index + (std::uint64_t{counter.word[0]} + first);
    const PhiloxLanes evens = philox(
        PhiloxLanes{{even, none + counter.word[1], none + counter.word[2], none + counter.word[3]}},
        philox_key);
    const PhiloxLanes odds = philox(PhiloxLanes{{even + 1, none + counter.word[1],
                                                 none + counter.word[2], none + counter.word[3]}},
                                    philox_key);
    for (int word = 0; word < 4; ++word) {
      const Words bits =
          reinterpret_cast<Words>((evens.word[word] & 0xffffffffu) | (odds.word[word] << 32));
      const Words low = bits & 0xffffu, high = bits >> 16;
      __builtin_memcpy(offsets + 32 * word + first, &low, sizeof(low));
      __builtin_memcpy(offsets + 32 * word + 16 + first, &high, sizeof(high));
    }
  }
#pragma omp simd
  for (int i = 0; i < kStochasticBlock; ++i)
    offsets[i] = stochastic_offset(std::bit_cast<std::uint32_t>(offsets[i]));
}

void sign_values(const QuantizeChunk& chunk, const float* master, std::int64_t n, float* values) {
  const QuantGroup group = chunk.group;
  const float mix = chunk.mix;
#pragma omp simd
  for (std::int64_t i = 0; i < n; ++i)
    values[i] = blend(mix, master[i], dequantize(sign_code(master[i], group), group));
}

void uniform_values(const QuantizeChunk& chunk, const float* master, const float* offsets,
                    std::int64_t n, float* values) {
  const QuantGroup group = chunk.group;
  const CodeLimits limits(chunk.spec.bits, chunk.spec.q_type);
  const float mix = chunk.mix;
#pragma omp simd
  for (std::int64_t i = 0; i < n; ++i) {
    const float code = uniform_code(master[i], group, limits, offsets[i]);
    values[i] = blend(mix, master[i], dequantize(code, group));
  }
}

/// Elements that are quantized at a time; the tiles of a parameter begin at multiples of this.
constexpr std::int64_t kTile = 8 * kStochasticBlock;

void quantize(const QuantizeChunk& chunk) {
  const bool stochastic = chunk.spec.rounding == Rounding::stochastic;
  alignas(64) float offsets[kTile] = {};
  alignas(64) float values[kTile];
  for (std::int64_t begin = 0; begin < chunk.numel;) {
    // A chunk may begin inside a tile of its parameter, and end in one.
    const std::int64_t in_tile = (chunk.element + begin) % kTile;
    const std::int64_t first_block = (chunk.element + begin - in_tile) / kStochasticBlock;
    const std::int64_t rest = chunk.numel - begin;
    const std::int64_t n = kTile - in_tile < rest ? kTile - in_tile : rest;
    const float* master = chunk.master + begin;
    for (std::int64_t at = in_tile / kStochasticBlock * kStochasticBlock;
         stochastic && at < in_tile + n; at += kStochasticBlock)
      stochastic_offsets(chunk.key, first_block + at / kStochasticBlock, offsets + at);
    if (is_sign_quantized(chunk.spec.bits)) {
      sign_values(chunk, master, n, values);
    } else {
      uniform_values(chunk, master, offsets + in_tile, n, values);
    }
    dispatch(chunk.dtype, [&](auto tag) {
      auto* working = static_cast<typename decltype(tag)::type*>(chunk.working) + begin;
      for_each_vector(n, [&](std::int64_t i, std::int64_t count) {
        store_lanes(working + i, load(values + i), count);
      });
    });
    begin += n;
  }
}

}  // namespace

extern const FakeQuantizeKernels fake_quantize_kernels;
const FakeQuantizeKernels fake_quantize_kernels{widen_range, chunk_sum, quantize};

}  // namespace bitfall::BITFALL_ISA
