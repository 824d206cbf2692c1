// Elements in device memory as f32: conversions, 16-byte accesses, and the columns that share
// random numbers.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "core/rng.h"

namespace bitfall {

/// Threads of a block in kernels that treat every element alone.
inline constexpr int kBlockThreads = 256;

/// Blocks of kBlockThreads threads that take `items` items in turns.
inline unsigned blocks_for(std::int64_t items) {
  constexpr std::int64_t kMostBlocks = std::int64_t{1} << 20;
  const std::int64_t blocks = (items + kBlockThreads - 1) / kBlockThreads;
  return static_cast<unsigned>(blocks < kMostBlocks ? blocks : kMostBlocks);
}

/// Number of this thread in the whole grid, and the number of threads there are.
__device__ inline std::int64_t grid_thread() {
  return static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
}
__device__ inline std::int64_t grid_threads() {
  return static_cast<std::int64_t>(gridDim.x) * blockDim.x;
}

// The values of core/dtype.h's to_float and from_float, by the GPU's own instructions. Only the
// payload of a NaN may differ.

__device__ inline float widen(float value) { return value; }
__device__ inline float widen(BFloat16 value) {
  return __uint_as_float(static_cast<std::uint32_t>(value.bits) << 16);
}
__device__ inline float widen(Float16 value) { return __half2float(__ushort_as_half(value.bits)); }

template <typename T>
__device__ T narrow(float value);
template <>
__device__ inline float narrow<float>(float value) {
  return value;
}
template <>
__device__ inline BFloat16 narrow<BFloat16>(float value) {
  return {__bfloat16_as_ushort(__float2bfloat16_rn(value))};
}
template <>
__device__ inline Float16 narrow<Float16>(float value) {
  return {__half_as_ushort(__float2half_rn(value))};
}

/// Eight elements of one thread.
struct Eight {
  float value[8];
};

template <typename T>
struct alignas(16) Pack {
  static constexpr int kSize = 16 / sizeof(T);
  T element[kSize];
};

/// Whether 16-byte accesses are possible from here on.
template <typename T>
__host__ __device__ inline bool aligned(const T* data) {
  return (reinterpret_cast<std::uintptr_t>(data) & 15u) == 0;
}

/// The eight elements at an aligned address.
template <typename T>
__device__ inline Eight load_packs(const T* data) {
  const Pack<T>* packs = reinterpret_cast<const Pack<T>*>(data);
  Eight result;
#pragma unroll
  for (int pack = 0; pack < 8 / Pack<T>::kSize; ++pack) {
    const Pack<T> loaded = packs[pack];
#pragma unroll
    for (int i = 0; i < Pack<T>::kSize; ++i)
      result.value[pack * Pack<T>::kSize + i] = widen(loaded.element[i]);
  }
  return result;
}

template <typename T>
__device__ inline void store_packs(T* data, const Eight& values) {
  Pack<T>* packs = reinterpret_cast<Pack<T>*>(data);
#pragma unroll
  for (int pack = 0; pack < 8 / Pack<T>::kSize; ++pack) {
    Pack<T> stored;
#pragma unroll
    for (int i = 0; i < Pack<T>::kSize; ++i)
      stored.element[i] = narrow<T>(values.value[pack * Pack<T>::kSize + i]);
    packs[pack] = stored;
  }
}

/// Whether elements first .. first + 7 lie within [begin, end) and at a 16-byte boundary.
template <typename T>
__device__ inline bool whole(const T* data, std::int64_t first, std::int64_t begin,
                             std::int64_t end) {
  return first >= begin && first + 8 <= end && aligned(data + first);
}

/// Elements first .. first + 7 of `data`; those outside of [begin, end) are not read and become 0.
template <typename T>
__device__ inline Eight load_eight(const T* data, std::int64_t first, std::int64_t begin,
                                   std::int64_t end) {
  if (whole(data, first, begin, end)) return load_packs(data + first);
  Eight result;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const std::int64_t index = first + i;
    result.value[i] = index >= begin && index < end ? widen(data[index]) : 0.0f;
  }
  return result;
}

/// Stores to elements first .. first + 7, those outside of [begin, end) excepted.
template <typename T>
__device__ inline void store_eight(T* data, std::int64_t first, std::int64_t begin,
                                   std::int64_t end, const Eight& values) {
  if (whole(data, first, begin, end)) return store_packs(data + first, values);
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const std::int64_t index = first + i;
    if (index >= begin && index < end) data[index] = narrow<T>(values.value[i]);
  }
}

// --- columns that share one Philox block: 128 b + lane + 16 i for i = 0 .. 7, see dropout_bits.
// Sixteen threads with neighbouring lanes read neighbouring columns.

/// Number i of the eight of a block. Where i is known only at run time, the words go to memory.
__device__ inline std::uint32_t random_half(const PhiloxBlock& block, int i) {
  return (block.word[i / 2] >> (16 * (i % 2))) & 0xffffu;
}

/// First of the eight columns of item number `item`, 0 <= item < 16 * ceil(columns / 128).
__device__ inline std::int64_t first_column(std::int64_t item) {
  return item / 16 * 128 + item % 16;
}

/// Columns first + 16 i of a row; 0 from `columns` on.
template <typename T>
__device__ inline Eight load_columns(const T* row, std::int64_t first, std::int64_t columns) {
  Eight result;
#pragma unroll
  for (int i = 0; i < 8; ++i)
    result.value[i] = first + 16 * i < columns ? widen(row[first + 16 * i]) : 0.0f;
  return result;
}

/// What the elements in columns first + 16 i of the row {sample_key, position} are multiplied by.
__device__ inline Eight dropout_multipliers(const Dropout& dropout, std::int32_t sample_key,
                                            std::int32_t position, std::int64_t first) {
  const std::uint32_t counter = static_cast<std::uint32_t>(16 * (first / 128) + first % 16);
  const PhiloxBlock block = philox(
      {{counter, static_cast<std::uint32_t>(position), static_cast<std::uint32_t>(sample_key), 0}},
      dropout.key());
  const std::uint32_t threshold = dropout.threshold();
  const float scale = dropout.scale();
  Eight result;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    result.value[i] = random_half(block, i) < threshold ? 0.0f : scale;
  }
  return result;
}

/// The same for row number `row` of `row_keys` [R, 2]; ones where dropout is off.
__device__ inline Eight row_multipliers(const Dropout& dropout, const std::int32_t* row_keys,
                                        std::int64_t row, std::int64_t first) {
  if (dropout.enabled())
    return dropout_multipliers(dropout, row_keys[2 * row], row_keys[2 * row + 1], first);
  Eight ones;
#pragma unroll
  for (int i = 0; i < 8; ++i) ones.value[i] = 1.0f;
  return ones;
}

}  // namespace bitfall
