// Counter-based random numbers (Philox4x32-10, Salmon et al., SC 2011): the same on host and
// device, independent of thread count, rank count and packing, because each number is a pure
// function of what it is for.
#pragma once

#include <cstdint>

#include "core/dtype.h"

namespace bitfall {

struct PhiloxKey {
  std::uint32_t low = 0;
  std::uint32_t high = 0;
};

struct PhiloxBlock {
  std::uint32_t word[4];
};

inline constexpr int kPhiloxRounds = 10;

/// One round of Philox4x32.
BITFALL_INLINE PhiloxBlock philox_round(PhiloxBlock counter, PhiloxKey key) {
  const std::uint64_t product0 = 0xD2511F53ull * counter.word[0];
  const std::uint64_t product1 = 0xCD9E8D57ull * counter.word[2];
  return {{static_cast<std::uint32_t>(product1 >> 32) ^ counter.word[1] ^ key.low,
           static_cast<std::uint32_t>(product1),
           static_cast<std::uint32_t>(product0 >> 32) ^ counter.word[3] ^ key.high,
           static_cast<std::uint32_t>(product0)}};
}

/// The key of the round after that of `key`.
BITFALL_INLINE PhiloxKey next_philox_key(PhiloxKey key) {
  return {key.low + 0x9E3779B9u, key.high + 0xBB67AE85u};
}

/// Ten rounds of Philox4x32 on `counter` under `key`.
BITFALL_INLINE PhiloxBlock philox(PhiloxBlock counter, PhiloxKey key) {
  for (int round = 0; round < kPhiloxRounds; ++round) {
    counter = philox_round(counter, key);
    key = next_philox_key(key);
  }
  return counter;
}

/// Identity of a sample among those of all steps: the samples of one step differ, and with N of
/// them a key comes again after some 2^31 / N steps.
BITFALL_INLINE std::uint32_t sample_key_in_step(std::uint32_t sample, std::uint32_t step) {
  return sample + 0x9E3779B9u * step;
}

/// Dropout at one place of the network.
///
/// Row r of a tensor is identified by `row_keys[r] = {sample_key, position}` (for attention, the
/// row of the probabilities of head a and query q is {sample_key, (a << 16) | q}), so a mask
/// depends on sample and step alone: not on padding, micro-batches or ranks.
struct Dropout {
  float probability = 0.0f;  ///< 0 switches it off; below 1
  std::uint64_t seed = 0;
  std::uint32_t site = 0;  ///< which dropout of the network

  /// An element is dropped when its 16 random bits are below this.
  BITFALL_INLINE std::uint32_t threshold() const {
    // Never negative, so this rounds, and std::lround is not for device code.
    // NOLINTNEXTLINE(bugprone-incorrect-roundings)
    return static_cast<std::uint32_t>(probability * 65536.0f + 0.5f);
  }
  /// Kept elements are multiplied by this; unbiased for the probability as rounded to 1/65536.
  BITFALL_INLINE float scale() const { return 65536.0f / static_cast<float>(65536u - threshold()); }
  BITFALL_INLINE bool enabled() const { return threshold() != 0; }
  BITFALL_INLINE PhiloxKey key() const {
    return {static_cast<std::uint32_t>(seed), static_cast<std::uint32_t>(seed >> 32) ^ site};
  }
};

/// The 16 random bits of element `column` of the row {sample_key, position}.
///
/// Columns go in blocks of 128. Counter word 0 = 16 * (column / 128) + column % 16; of the eight
/// 16-bit halves of the result (word 0 low, word 0 high, word 1 low, ...) element takes number
/// (column % 128) / 16. So 16 neighbouring lanes of a vector hold 16 neighbouring columns.
BITFALL_INLINE std::uint32_t dropout_bits(const Dropout& dropout, std::uint32_t sample_key,
                                          std::uint32_t position, std::uint32_t column) {
  const PhiloxBlock block =
      philox({{16 * (column / 128) + column % 16, position, sample_key, 0}}, dropout.key());
  const std::uint32_t half = (column % 128) / 16;
  // No index that is known at run time only: a GPU would keep the words in memory for it.
  const std::uint32_t low = half < 4 ? block.word[0] : block.word[2];
  const std::uint32_t high = half < 4 ? block.word[1] : block.word[3];
  return ((half % 4 < 2 ? low : high) >> (16 * (half % 2))) & 0xffffu;
}

/// Uniform in [0, 1): the upper 24 bits of `word`.
BITFALL_INLINE float uniform01(std::uint32_t word) {
  return static_cast<float>(word >> 8) * 0x1p-24f;
}

}  // namespace bitfall
