// The arithmetic of weight quantization, spec A5: the one definition that CPU kernels, CUDA kernels
// and integer_weights share, so that all of them agree bit for bit.
//
// Everything is f32 and uses only operations that IEEE 754 rounds exactly. Contraction into fused
// multiply-add must stay off where this header is compiled (blend is the only place it could bite).
//
// Edge cases, the same everywhere:
//  - a constant group (one element counts as constant) keeps its value, also where the clamp would
//    move it: scale = |value|;
//  - a scale that underflows becomes the smallest f32, whose multiples are the group's values;
//  - asymmetric scales are never finer than max|g| * 2^-22: below that the grid would be finer than
//    f32 itself, and zero points would leave the range in which f32 counts exactly;
//  - a group that holds a NaN or an infinity becomes NaN as a whole: the fault stays visible;
//  - zero is +0.0, whatever the sign of what was rounded to it.
#pragma once

#include <bit>
#include <cstdint>

#include "core/quant_spec.h"
#include "core/rng.h"

namespace bitfall {

/// From this width on a weight is only cast.
inline constexpr int kCastBits = 16;

/// Ternary (2 bits) and binary (1 bit) weights have the values -scale, 0 and scale.
BITFALL_INLINE bool is_sign_quantized(int bits) { return bits <= 2; }

BITFALL_INLINE float magnitude(float x) {
  return std::bit_cast<float>(std::bit_cast<std::uint32_t>(x) & 0x7fffffffu);
}

/// 2^exponent, -126 <= exponent <= 127.
BITFALL_INLINE float power_of_two(int exponent) {
  return std::bit_cast<float>(static_cast<std::uint32_t>(exponent + 127) << 23);
}

inline constexpr float kLargestFloat = 0x1.fffffep127f;

/// Nearest integer, ties to even, for |x| <= 2^22: in 2^23 .. 2^24 an f32 has no fraction left.
BITFALL_INLINE float round_half_even(float x) { return (x + 0x1.8p23f) - 0x1.8p23f; }

/// An integer that orders floats by value, NaNs at the ends; its own inverse on the bits.
BITFALL_INLINE std::int32_t order_key(float x) {
  const std::int32_t bits = std::bit_cast<std::int32_t>(x);
  return bits ^ ((bits >> 31) & 0x7fffffff);
}

BITFALL_INLINE float from_order_key(std::int32_t key) {
  return std::bit_cast<float>(key ^ ((key >> 31) & 0x7fffffff));
}

/// Smallest and largest order_key of a group; the minimum and maximum of parts are those of the
/// whole, in any order.
struct QuantRange {
  std::int32_t min_key = 0x7fffffff;
  std::int32_t max_key = -0x7fffffff - 1;

  BITFALL_INLINE bool finite() const {
    return max_key < 0x7f800000 && min_key > -0x7f800001;  // the keys of +inf and -inf
  }
  BITFALL_INLINE float min() const { return from_order_key(min_key); }
  BITFALL_INLINE float max() const { return from_order_key(max_key); }
  BITFALL_INLINE float max_magnitude() const {
    return magnitude(min()) > magnitude(max()) ? magnitude(min()) : magnitude(max());
  }
};

/// What the elements of one group share. value = (code + zero_point) * scale.
struct QuantGroup {
  float scale = 1.0f;
  float zero_point = 0.0f;  ///< an integer, |zero_point| <= 2^22; 0 unless asymmetric
  float threshold = 0.0f;   ///< ternary and binary: magnitudes up to this have code 0
};

/// Smallest and largest code of `bits` > 2.
struct CodeLimits {
  float min, max;

  BITFALL_INLINE CodeLimits(int bits, QuantType q_type)
      : min(q_type == QuantType::symmetric ? -power_of_two(bits - 1) : 0.0f),
        max((q_type == QuantType::symmetric ? power_of_two(bits - 1) : power_of_two(bits)) - 1) {}
};

/// Scale and zero point for 2 < bits < 16.
///
/// symmetric: scale = 2 max|g| / 2^bits. asymmetric: scale = (max - min) / 2^bits, zero_point =
/// round(min / scale). Both are written so that no intermediate overflows.
BITFALL_INLINE QuantGroup uniform_group(int bits, QuantType q_type, const QuantRange& range) {
  const float min = range.min(), max = range.max(), largest = range.max_magnitude();
  QuantGroup group;
  if (!range.finite()) {
    group.scale = std::bit_cast<float>(0x7fc00000u);  // NaN
    return group;
  }
  if (min == max) {
    group.scale = largest == 0.0f ? 1.0f : largest;
  } else if (q_type == QuantType::symmetric) {
    group.scale = largest * power_of_two(1 - bits);
  } else {
    const float step = (max * 0.5f - min * 0.5f) * power_of_two(1 - bits);
    const float finest = largest * power_of_two(-22);
    group.scale = step > finest ? step : finest;
  }
  if (group.scale == 0.0f) group.scale = std::bit_cast<float>(1u);  // 2^-149
  if (q_type == QuantType::asymmetric) {
    group.zero_point = round_half_even(min / group.scale) + 0.0f;
    // Rounded away from a minimum near the end of f32, the lowest value would overflow.
    if (magnitude(group.zero_point * group.scale) > kLargestFloat) group.zero_point += 1.0f;
  }
  return group;
}

/// Code of g, `quotient` being g / scale: an integer within `limits`. `offset` in (-0.5, 0.5) is 0
/// for rounding to nearest and stochastic_offset otherwise.
BITFALL_INLINE float code_of_quotient(float quotient, const QuantGroup& group, CodeLimits limits,
                                      float offset) {
  const float code = round_half_even(quotient + offset) - group.zero_point;
  const float above = code < limits.min ? limits.min : code;
  return above > limits.max ? limits.max : above;
}

BITFALL_INLINE float uniform_code(float g, const QuantGroup& group, CodeLimits limits,
                                  float offset) {
  return code_of_quotient(g / group.scale, group, limits, offset);
}

/// Code -1, 0 or 1 of a ternary or binary weight.
BITFALL_INLINE float sign_code(float g, const QuantGroup& group) {
  const float sign = g < 0.0f ? -1.0f : 1.0f;
  return magnitude(g) > group.threshold ? sign : 0.0f;
}

/// The weight that a code stands for.
BITFALL_INLINE float dequantize(float code, const QuantGroup& group) {
  return (code + group.zero_point) * group.scale;
}

/// mix * g + (1 - mix) * value: fp16_mixed_quantize, spec B3.6.
BITFALL_INLINE float blend(float mix, float g, float value) {
#if defined(__CUDA_ARCH__)
  return __fadd_rn(__fmul_rn(mix, g), __fmul_rn(1.0f - mix, value));
#else
  return mix * g + (1.0f - mix) * value;
#endif
}

/// Sum of the magnitudes above a threshold, and how many there are.
struct MagnitudeSum {
  double sum = 0;
  std::int64_t count = 0;
};

/// Below every magnitude: sums all elements.
inline constexpr float kNoThreshold = -1.0f;

/// Order of the sums behind ternary and binary scales: the group is cut into chunks of
/// kQuantSumChunk elements; chunk sums are added in rising order. So threads of a CPU or blocks of
/// a GPU can share the work and get one result.
inline constexpr std::int64_t kQuantSumChunk = 16384;

/// How a range falls into groups, and those into chunks of at most kQuantSumChunk elements. Counted
/// from the beginning of the range.
struct QuantChunks {
  std::int64_t group_numel = 0, chunks_per_group = 0, count = 0;

  struct Chunk {
    std::int64_t group, begin, end;
  };

  BITFALL_INLINE QuantChunks(std::int64_t numel, std::int64_t groups)
      : group_numel(numel / groups),
        chunks_per_group((group_numel + kQuantSumChunk - 1) / kQuantSumChunk),
        count(groups * chunks_per_group) {}

  BITFALL_INLINE Chunk operator[](std::int64_t chunk) const {
    const std::int64_t group = chunk / chunks_per_group;
    const std::int64_t begin = group * group_numel + chunk % chunks_per_group * kQuantSumChunk;
    const std::int64_t group_end = (group + 1) * group_numel;
    return {group, begin, begin + kQuantSumChunk < group_end ? begin + kQuantSumChunk : group_end};
  }
};

/// Magnitudes above `threshold` of one chunk, n <= kQuantSumChunk: f64 lane i of 256 adds elements
/// i, i + 256, ... in rising order; then the lanes are folded in halves (lane i += lane i + half).
BITFALL_INLINE MagnitudeSum magnitude_sum(const float* x, std::int64_t n, float threshold) {
  constexpr int kSumLanes = 256;
  double sums[kSumLanes] = {};
  std::int32_t count = 0;
  for (std::int64_t row = 0; row < n; row += kSumLanes) {
    const std::int64_t lanes = n - row < kSumLanes ? n - row : kSumLanes;
    for (std::int64_t lane = 0; lane < lanes; ++lane) {
      const float value = magnitude(x[row + lane]);
      sums[lane] += static_cast<double>(value > threshold ? value : 0.0f);
      count += value > threshold ? 1 : 0;
    }
  }
  for (int half = kSumLanes / 2; half > 0; half /= 2) {
    for (int lane = 0; lane < half; ++lane) sums[lane] += sums[lane + half];
  }
  return {sums[0], count};
}

/// Ternary: magnitudes up to 0.7 mean|g| become 0 (Li et al., "Ternary weight networks", 2016).
/// `all` is the sum over the whole group.
BITFALL_INLINE float ternary_threshold(const MagnitudeSum& all) {
  return 0.7f * static_cast<float>(all.sum / static_cast<double>(all.count));
}

/// Scale of ternary and binary groups: the mean magnitude of the elements above `threshold`
/// (binary: of all elements, with threshold 0).
BITFALL_INLINE QuantGroup sign_group(const QuantRange& range, float threshold,
                                     const MagnitudeSum& above) {
  QuantGroup group;
  group.threshold = threshold;
  group.scale =
      above.count == 0 ? 0.0f : static_cast<float>(above.sum / static_cast<double>(above.count));
  if (range.finite() && range.min() == range.max()) {
    group.threshold = 0.0f;
    group.scale = range.max_magnitude();
  }
  if (!range.finite()) group.scale = std::bit_cast<float>(0x7fc00000u);  // NaN
  return group;
}

/// Elements that share 16 Philox blocks.
inline constexpr std::int64_t kStochasticBlock = 128;

/// Philox counter for stochastic rounding, spec A5: with the key below, a pure function of (seed,
/// step, parameter, element).
///
/// Elements of the flattened parameter go in blocks of 128, laid out as in dropout_bits: counter
/// word 0 = 16 * (element / 128) + lane with lane = element % 16 (it repeats after 2^35 elements);
/// words 1..3 = parameter and step (low, high).
BITFALL_INLINE PhiloxBlock stochastic_counter(const StochasticKey& key, std::int64_t block,
                                              std::uint32_t lane) {
  return {{16 * static_cast<std::uint32_t>(block) + lane, key.parameter,
           static_cast<std::uint32_t>(key.step), static_cast<std::uint32_t>(key.step >> 32)}};
}

/// The seed, its upper word marked so that no Dropout site shares the numbers.
BITFALL_INLINE PhiloxKey stochastic_philox_key(const StochasticKey& key) {
  return {static_cast<std::uint32_t>(key.seed),
          static_cast<std::uint32_t>(key.seed >> 32) ^ 0x80000000u};
}

/// 16 random bits k -> (k + 0.5) / 65536 - 0.5: uniform, symmetric about 0 and inside (-0.5, 0.5),
/// so that up to 8 bits a weight that lies on the grid stays there.
BITFALL_INLINE float stochastic_offset(std::uint32_t bits16) {
  return static_cast<float>(static_cast<std::int32_t>(2 * bits16) - 65535) * 0x1p-17f;
}

/// The offset of one element: half (element % 128) / 16 of its block, low half of word 0 first.
BITFALL_INLINE float stochastic_offset(const StochasticKey& key, std::int64_t element) {
  const PhiloxBlock counter =
      stochastic_counter(key, element / kStochasticBlock, static_cast<std::uint32_t>(element % 16));
  const PhiloxBlock block = philox(counter, stochastic_philox_key(key));
  const std::uint32_t half = static_cast<std::uint32_t>(element % kStochasticBlock) / 16;
  return stochastic_offset((block.word[half / 2] >> (16 * (half % 2))) & 0xffffu);
}

}  // namespace bitfall
