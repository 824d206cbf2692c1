// Smallest and largest weight of a block's part of a group.
#pragma once

#include "csrc_cuda/reduce.cuh"
#include "quantizer/quant_math.h"

namespace bitfall {

/// Threads of a block in the quantizer's kernels; also the lanes of quant_math.h's magnitude_sum.
inline constexpr int kQuantThreads = 256;
inline constexpr int kQuantWarps = kQuantThreads / kWarpThreads;

__device__ inline void widen_range(QuantRange& range, float value) {
  const std::int32_t key = order_key(value);
  range.min_key = min(range.min_key, key);
  range.max_key = max(range.max_key, key);
}

__device__ inline void widen_range(QuantRange& range, const QuantRange& other) {
  range.min_key = min(range.min_key, other.min_key);
  range.max_key = max(range.max_key, other.max_key);
}

/// A QuantRange per warp, without an initializer, which shared memory must not have.
struct WarpRanges {
  std::int32_t min_key[kQuantWarps], max_key[kQuantWarps];
};

/// The range of all threads of the block, in each of them. All must call it; `warps` may be used
/// again at once.
__device__ inline QuantRange block_range(QuantRange range, WarpRanges& warps) {
  range.min_key = __reduce_min_sync(kWholeWarp, range.min_key);
  range.max_key = __reduce_max_sync(kWholeWarp, range.max_key);
  __syncthreads();  // the last readers of `warps` are done
  if (threadIdx.x % kWarpThreads == 0) {
    warps.min_key[threadIdx.x / kWarpThreads] = range.min_key;
    warps.max_key[threadIdx.x / kWarpThreads] = range.max_key;
  }
  __syncthreads();
  for (int warp = 0; warp < kQuantWarps; ++warp)
    widen_range(range, {warps.min_key[warp], warps.max_key[warp]});
  return range;
}

}  // namespace bitfall
