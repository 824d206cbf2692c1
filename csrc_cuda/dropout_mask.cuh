// Dropout masks of neighbouring columns, for threads that hold eight of them.
#pragma once

#include <cstdint>

#include "core/rng.h"
#include "csrc_cuda/element.cuh"
#include "csrc_cuda/reduce.cuh"

namespace bitfall {

/// A Dropout for kernels: what depends on nothing else is computed before the launch.
struct DropoutMask {
  PhiloxKey keys[kPhiloxRounds];
  std::uint32_t threshold;
  float scale;

  explicit DropoutMask(const Dropout& dropout)
      : threshold(dropout.threshold()), scale(dropout.scale()) {
    keys[0] = dropout.key();
    for (int round = 1; round < kPhiloxRounds; ++round)
      keys[round] = next_philox_key(keys[round - 1]);
  }
  __device__ bool enabled() const { return threshold != 0; }
};

/// What dropout knows a row by.
struct RowKey {
  std::uint32_t sample_key, position;

  /// Of row number `row` of `row_keys` [R, 2]; anything if that is null.
  __device__ RowKey(const std::int32_t* row_keys, std::int64_t row) : sample_key(0), position(0) {
    if (row_keys == nullptr) return;
    sample_key = static_cast<std::uint32_t>(row_keys[2 * row]);
    position = static_cast<std::uint32_t>(row_keys[2 * row + 1]);
  }
};

/// Which of the columns 8 * group + i of the row {sample_key, position} dropout keeps, bit i being
/// set; see dropout_bits. All lanes of a warp must call it, with neighbouring groups, the first a
/// multiple of 32.
///
/// Each lane draws the numbers of eight columns that lie 16 apart. Column i of a lane is number
/// lane % 16 / 2 of what lane lane % 2 * 8 + i of the same sixteen has drawn.
__device__ inline unsigned kept_columns(const DropoutMask& dropout, const RowKey& key,
                                        std::uint32_t group) {
  PhiloxBlock block{{group, key.position, key.sample_key, 0}};
#pragma unroll
  for (int round = 0; round < kPhiloxRounds; ++round)
    block = philox_round(block, dropout.keys[round]);
  unsigned votes[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    votes[i] = __ballot_sync(kWholeWarp, random_half(block, i) >= dropout.threshold);
  }
  const unsigned lane = threadIdx.x % kWarpThreads;
#pragma unroll
  for (unsigned half = 4; half > 0; half /= 2) {
#pragma unroll
    for (unsigned i = 0; i < half; ++i)
      if ((lane & (2 * half)) != 0) votes[i] = votes[i + half];
  }
  return votes[0] >> (lane / 16 * 16 + lane % 2 * 8) & 0xffu;
}

}  // namespace bitfall
