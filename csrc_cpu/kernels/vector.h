// Vector arithmetic for kernel sources: as many f32 lanes as the instruction set's registers hold.
//
// Written with the compiler's vector extensions, so a kernel is one text for all instruction sets.
// Without fused multiply-add (`multiply_add` apart) a lane's result does not depend on the lane
// count: elementwise kernels give the same bits on every instruction set. Reductions do not.
#pragma once

#include <cstdint>

#include "core/dtype.h"
#include "core/rng.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace bitfall::BITFALL_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef std::int32_t Ints __attribute__((vector_size(4 * kLanes)));
typedef std::uint32_t Words __attribute__((vector_size(4 * kLanes)));
typedef std::uint16_t HalfWords __attribute__((vector_size(2 * kLanes)));
typedef std::uint64_t LongWords __attribute__((vector_size(4 * kLanes)));

BITFALL_INLINE Floats broadcast(float value) { return value - Floats{}; }
BITFALL_INLINE Ints as_ints(Floats x) { return reinterpret_cast<Ints>(x); }
BITFALL_INLINE Floats as_floats(Ints x) { return reinterpret_cast<Floats>(x); }

// --- loads and stores, to and from f32; memory need not be aligned

BITFALL_INLINE Floats load(const float* source) {
  Floats x;
  __builtin_memcpy(&x, source, sizeof(x));
  return x;
}

BITFALL_INLINE Floats load(const BFloat16* source) {
  // g++ 12 widens a generic vector in four instructions.
#if defined(__AVX512F__)
  const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source));
  return reinterpret_cast<Floats>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
#elif defined(__AVX2__)
  const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(source));
  return reinterpret_cast<Floats>(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
#else
  HalfWords halves;
  __builtin_memcpy(&halves, source, sizeof(halves));
  return reinterpret_cast<Floats>(__builtin_convertvector(halves, Words) << 16);
#endif
}

BITFALL_INLINE Floats load(const Float16* source) {
#if defined(__AVX512F__)
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(source)));
#elif defined(__F16C__)
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source)));
#else
  float lanes[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) lanes[lane] = to_float(source[lane]);
  return load(lanes);
#endif
}

BITFALL_INLINE void store(float* destination, Floats x) {
  __builtin_memcpy(destination, &x, sizeof(x));
}

/// Round to nearest even, NaN stays NaN. (The conversion instruction of AVX512_BF16 flushes
/// subnormals, so it would not agree with the other instruction sets.)
BITFALL_INLINE void store(BFloat16* destination, Floats x) {
  const Words bits = reinterpret_cast<Words>(x);
  const Words rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  const Words chosen = x == x ? rounded : (bits | 0x400000u);
  const HalfWords halves = __builtin_convertvector(chosen >> 16, HalfWords);
  __builtin_memcpy(destination, &halves, sizeof(halves));
}

BITFALL_INLINE void store(Float16* destination, Floats x) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(destination),
                      _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__F16C__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(destination),
                   _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int lane = 0; lane < kLanes; ++lane) destination[lane] = from_float<Float16>(x[lane]);
#endif
}

/// The first `count` < kLanes elements, zeros behind them.
template <typename T>
BITFALL_INLINE Floats load_first(const T* source, std::int64_t count) {
  float lanes[kLanes] = {};
  for (std::int64_t lane = 0; lane < count; ++lane) lanes[lane] = to_float(source[lane]);
  return load(lanes);
}

template <typename T>
BITFALL_INLINE void store_first(T* destination, Floats x, std::int64_t count) {
  T lanes[kLanes];
  store(lanes, x);
  for (std::int64_t lane = 0; lane < count; ++lane) destination[lane] = lanes[lane];
}

/// A full vector, or its first `count` lanes where count < kLanes; for use in for_each_vector.
template <typename T>
BITFALL_INLINE Floats load_lanes(const T* source, std::int64_t count) {
  return count >= kLanes ? load(source) : load_first(source, count);
}

template <typename T>
BITFALL_INLINE void store_lanes(T* destination, Floats x, std::int64_t count) {
  if (count >= kLanes) {
    store(destination, x);
  } else {
    store_first(destination, x, count);
  }
}

/// x with zeros from lane `count` on.
BITFALL_INLINE Floats first_lanes(Floats x, std::int64_t count) {
  if (count >= kLanes) return x;
  float lanes[kLanes];
  store(lanes, x);
  return load_first(lanes, count);
}

/// Calls `body(begin, count)` for each vector of [0, size): count is the constant kLanes, except in
/// a last shorter call.
template <typename Body>
BITFALL_INLINE void for_each_vector(std::int64_t size, Body&& body) {
  std::int64_t begin = 0;
  for (; begin + kLanes <= size; begin += kLanes) body(begin, kLanes);
  if (begin < size) body(begin, size - begin);
}

/// Calls `function(TypeTag<T>{})` for f32, bf16 and f16; the operation files have refused others.
template <typename Function>
BITFALL_INLINE void dispatch(DType dtype, Function&& function) {
  switch (dtype) {
    case DType::f32:
      return function(TypeTag<float>{});
    case DType::bf16:
      return function(TypeTag<BFloat16>{});
    case DType::f16:
      return function(TypeTag<Float16>{});
    default:
      return;
  }
}

// --- arithmetic

BITFALL_INLINE Floats max(Floats a, Floats b) { return a > b ? a : b; }
BITFALL_INLINE Floats min(Floats a, Floats b) { return a < b ? a : b; }
BITFALL_INLINE Floats abs(Floats x) { return as_floats(as_ints(x) & 0x7fffffff); }

/// a * b + c, fused where the instruction set can: for reductions only (see the top).
BITFALL_INLINE Floats multiply_add(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__FMA__)
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}

/// Sum over the lanes, pairwise.
BITFALL_INLINE float sum(Floats x) {
  typedef float Four __attribute__((vector_size(16)));
#if defined(__AVX512F__)
  typedef float Eight __attribute__((vector_size(32)));
  const Eight eight = __builtin_shufflevector(x, x, 0, 1, 2, 3, 4, 5, 6, 7) +
                      __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15);
  const Four four = __builtin_shufflevector(eight, eight, 0, 1, 2, 3) +
                    __builtin_shufflevector(eight, eight, 4, 5, 6, 7);
#elif defined(__AVX2__)
  const Four four =
      __builtin_shufflevector(x, x, 0, 1, 2, 3) + __builtin_shufflevector(x, x, 4, 5, 6, 7);
#else
  const Four four = x;
#endif
  return (four[0] + four[2]) + (four[1] + four[3]);
}

/// Largest lane.
BITFALL_INLINE float max_lane(Floats x) {
  float result = x[0];
  for (int lane = 1; lane < kLanes; ++lane) result = x[lane] > result ? x[lane] : result;
  return result;
}

/// e^x within 2 units in the last place for x <= 88; 0 below -87.3, NaN for NaN. Above 88 it stays
/// at e^88.
BITFALL_INLINE Floats exp(Floats x) {
  constexpr float kLowest = -87.3f;
  const Floats clamped = x > 88.0f ? broadcast(88.0f) : (x < kLowest ? broadcast(kLowest) : x);
  // n = round(x / ln 2): adding 1.5 * 2^23 leaves the integer in the low mantissa bits.
  const Floats shifted = clamped * 1.44269504f + 12582912.0f;
  const Floats n = shifted - 12582912.0f;
  const Floats r = (clamped - n * 0.693359375f) - n * -2.12194440e-4f;
  Floats p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = (p * r) * r + r + 1.0f;
  // 2^n: 0x4b400000 are the bits of 1.5 * 2^23.
  const Floats power = as_floats((as_ints(shifted) - 0x4b400000 + 127) << 23);
  return x < kLowest ? Floats{} : p * power;
}

/// tanh(x), absolute error below 3e-7.
BITFALL_INLINE Floats tanh(Floats x) {
  const Floats e = exp(-2.0f * abs(x));
  const Floats magnitude = (1.0f - e) / (1.0f + e);
  return as_floats(as_ints(magnitude) | (as_ints(x) & as_ints(broadcast(-0.0f))));
}

struct Normal {
  Floats cdf;  ///< Phi(x)
  Floats pdf;  ///< phi(x)
};

/// Distribution and density of the standard normal; absolute error of the distribution below 2e-7.
///
/// Abramowitz & Stegun 7.1.26 for erfc(|x| / sqrt(2)) / 2: a polynomial in t = 1 / (1 + p |x|)
/// times the exponential that the density needs anyway.
BITFALL_INLINE Normal normal(Floats x) {
  const Floats t = 1.0f / (1.0f + abs(x) * (0.3275911f * 0.70710678f));
  Floats p = t * (0.5f * 1.061405429f) + 0.5f * -1.453152027f;
  p = p * t + 0.5f * 1.421413741f;
  p = p * t + 0.5f * -0.284496736f;
  p = p * t + 0.5f * 0.254829592f;
  const Floats e = exp(x * x * -0.5f);
  const Floats tail = p * t * e;
  return {x < 0.0f ? tail : 1.0f - tail, e * 0.39894228f};
}

// --- dropout

/// Low halves of 64-bit lanes times a 32-bit constant.
BITFALL_INLINE LongWords multiply_low_words(LongWords x, std::uint32_t factor) {
#if defined(__AVX512F__)
  return reinterpret_cast<LongWords>(
      _mm512_mul_epu32(reinterpret_cast<__m512i>(x), _mm512_set1_epi64(factor)));
#elif defined(__AVX2__)
  return reinterpret_cast<LongWords>(
      _mm256_mul_epu32(reinterpret_cast<__m256i>(x), _mm256_set1_epi64x(factor)));
#elif defined(__x86_64__)
  return reinterpret_cast<LongWords>(
      _mm_mul_epu32(reinterpret_cast<__m128i>(x), _mm_set1_epi64x(factor)));
#else
  return (x & 0xffffffffu) * factor;
#endif
}

/// Philox counters, one per 64-bit lane; the upper half of a lane is garbage.
struct PhiloxLanes {
  LongWords word[4];
};

BITFALL_INLINE PhiloxLanes philox(PhiloxLanes counter, PhiloxKey key) {
  for (int round = 0; round < 10; ++round) {
    const LongWords product0 = multiply_low_words(counter.word[0], 0xD2511F53u);
    const LongWords product1 = multiply_low_words(counter.word[2], 0xCD9E8D57u);
    counter = {{(product1 >> 32) ^ counter.word[1] ^ std::uint64_t{key.low}, product1,
                (product0 >> 32) ^ counter.word[3] ^ std::uint64_t{key.high}, product0}};
    key.low += 0x9E3779B9u;
    key.high += 0xBB67AE85u;
  }
  return counter;
}

constexpr std::int64_t kDropoutBlock = 128;  ///< columns that share their Philox blocks

/// What the elements of columns [128 * block, 128 * (block + 1)) are multiplied by: 0 where
/// dropout_bits() is below the threshold, dropout.scale() elsewhere. `multipliers` [128].
BITFALL_INLINE void dropout_multipliers(const Dropout& dropout, std::uint32_t sample_key,
                                        std::uint32_t position, std::int64_t block,
                                        float* multipliers) {
  const Floats scale = broadcast(dropout.scale());
  const auto threshold = static_cast<std::int32_t>(dropout.threshold());
  LongWords lane_index;
  for (int lane = 0; lane < kLanes / 2; ++lane) lane_index[lane] = 2 * static_cast<unsigned>(lane);
  const LongWords none{};
  for (int first = 0; first < 16; first += kLanes) {
    // Even columns in one set of lanes and odd ones in the other: a shift and an or join them.
    const LongWords even = lane_index + static_cast<std::uint64_t>(16 * block + first);
    const PhiloxLanes evens =
        philox(PhiloxLanes{{even, none + position, none + sample_key, none}}, dropout.key());
    const PhiloxLanes odds =
        philox(PhiloxLanes{{even + 1, none + position, none + sample_key, none}}, dropout.key());
    for (int word = 0; word < 4; ++word) {
      const Words bits =
          reinterpret_cast<Words>((evens.word[word] & 0xffffffffu) | (odds.word[word] << 32));
      const Ints low = reinterpret_cast<Ints>(bits & 0xffffu);
      const Ints high = reinterpret_cast<Ints>(bits >> 16);
      float* destination = multipliers + 32 * word + first;
      store(destination, low >= threshold ? scale : Floats{});
      store(destination + 16, high >= threshold ? scale : Floats{});
    }
  }
}

/// Calls `body(begin, size)` for each dropout block of [0, columns).
template <typename Body>
BITFALL_INLINE void for_each_block(std::int64_t columns, Body&& body) {
  std::int64_t begin = 0;
  for (; begin + kDropoutBlock <= columns; begin += kDropoutBlock) body(begin, kDropoutBlock);
  if (begin < columns) body(begin, columns - begin);
}

/// Dropout multipliers of one block at a time; all ones where dropout is off.
class DropoutMask {
 public:
  BITFALL_INLINE explicit DropoutMask(const Dropout& dropout)
      : dropout_(dropout), enabled_(dropout.enabled()) {
    for (float& multiplier : multipliers_) multiplier = 1.0f;
  }

  /// [128] for the block that starts at column `begin`; row_key = {sample_key, position} is not
  /// read where dropout is off. Valid until the next call.
  BITFALL_INLINE const float* block(const std::int32_t* row_key, std::int64_t begin) {
    if (enabled_) {
      dropout_multipliers(dropout_, static_cast<std::uint32_t>(row_key[0]),
                          static_cast<std::uint32_t>(row_key[1]), begin / kDropoutBlock,
                          multipliers_);
    }
    return multipliers_;
  }

 private:
  const Dropout dropout_;
  const bool enabled_;
  float multipliers_[kDropoutBlock];
};

}  // namespace
}  // namespace bitfall::BITFALL_ISA
