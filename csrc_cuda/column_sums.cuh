// Sums over rows of a matrix by one block, with as many loads in flight as there are registers for.
#pragma once

#include "csrc_cuda/element.cuh"

namespace bitfall {

// A thread owns kWidth columns: eight, read 16 bytes at a time, or one, at any address.

template <int kWidth, typename T>
__device__ inline Eight load_chunk(const T* data) {
  if constexpr (kWidth == 8) return load_packs(data);
  return {{widen(*data)}};
}

template <int kWidth>
__device__ inline void store_chunk(float* data, const Eight& values) {
  if constexpr (kWidth == 8) {
    store_packs(data, values);
  } else {
    *data = values.value[0];
  }
}

template <int kWidth>
__device__ inline void add_chunk(Eight& sum, const Eight& values) {
#pragma unroll
  for (int i = 0; i < kWidth; ++i) sum.value[i] += values.value[i];
}

inline constexpr int kInFlight = 4;  ///< rows that a thread reads at a time

/// Threads of a block: kSumLanes beside each other, kSumRows that share the rows. A kernel's
/// __launch_bounds__(kSumThreads, kSumBlocks) grants the registers that loads in flight take.
inline constexpr int kSumLanes = 16, kSumRows = 8;
inline constexpr int kSumThreads = kSumLanes * kSumRows, kSumBlocks = 7;

/// Sums over rows [begin, end) of x [rows, columns], of the kWidth columns from `column` on, in the
/// threads with threadIdx.y = 0. The order depends on the number of rows only. All threads of the
/// block must call it.
template <int kWidth, typename T>
__device__ inline Eight block_column_sums(const T* x, std::int64_t begin, std::int64_t end,
                                          std::int64_t column, std::int64_t columns) {
  Eight sum{};
  if (column < columns) {
#pragma unroll 1  // more would take the loads apart
    for (std::int64_t row = begin + threadIdx.y; row < end; row += kInFlight * kSumRows) {
      Eight values[kInFlight];
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        values[i] = Eight{};
        if (row + i * kSumRows < end)
          values[i] = load_chunk<kWidth>(x + (row + i * kSumRows) * columns + column);
      }
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) add_chunk<kWidth>(sum, values[i]);
    }
  }
  __shared__ Eight sums[kSumRows][kSumLanes];
  sums[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  for (int other = threadIdx.y == 0 ? 1 : kSumRows; other < kSumRows; ++other)
    add_chunk<kWidth>(sum, sums[other][threadIdx.x]);
  return sum;
}

}  // namespace bitfall
