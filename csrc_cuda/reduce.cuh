// Sums and maxima over a warp or a block, in a fixed order, so that equal inputs give equal bits.
#pragma once

namespace bitfall {

inline constexpr unsigned kWholeWarp = 0xffffffffu;
inline constexpr int kWarpThreads = 32;

/// Sum over the warp, in every lane. All 32 lanes must call it.
template <typename T>
__device__ inline T warp_sum(T value) {
#pragma unroll
  for (int distance = kWarpThreads / 2; distance > 0; distance /= 2)
    value += __shfl_xor_sync(kWholeWarp, value, distance);
  return value;
}

/// Maximum over the warp, in every lane; a NaN counts as missing. All 32 lanes must call it.
template <typename T>
__device__ inline T warp_max(T value) {
#pragma unroll
  for (int distance = kWarpThreads / 2; distance > 0; distance /= 2) {
    const T other = __shfl_xor_sync(kWholeWarp, value, distance);
    value = value < other ? other : value;
  }
  return value;
}

/// Sum over a one-dimensional block of whole warps, in every thread. `shared` holds one T per warp
/// and may be used again at once. All threads must call it.
template <typename T>
__device__ inline T block_sum(T value, T* shared) {
  value = warp_sum(value);
  __syncthreads();  // the last reader of `shared` is done
  if (threadIdx.x % kWarpThreads == 0) shared[threadIdx.x / kWarpThreads] = value;
  __syncthreads();
  T total = shared[0];
  for (unsigned warp = 1; warp < blockDim.x / kWarpThreads; ++warp) total += shared[warp];
  return total;
}

}  // namespace bitfall
