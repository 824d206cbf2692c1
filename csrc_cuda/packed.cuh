// Eight elements in as few registers as they have bits, for kernels that hold whole rows.
#pragma once

#include <bit>
#include <cstdint>

#include "csrc_cuda/element.cuh"

namespace bitfall {

__device__ inline std::uint32_t bits_of(float value) { return std::bit_cast<std::uint32_t>(value); }
__device__ inline std::uint32_t bits_of(BFloat16 value) { return value.bits; }
__device__ inline std::uint32_t bits_of(Float16 value) { return value.bits; }

/// Two elements as they lie in a word.
template <typename T>
__device__ std::uint32_t narrow_pair(float low, float high);
template <>
__device__ inline std::uint32_t narrow_pair<BFloat16>(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return __bfloat16_as_ushort(pair.x) | static_cast<std::uint32_t>(__bfloat16_as_ushort(pair.y))
                                            << 16;
}
template <>
__device__ inline std::uint32_t narrow_pair<Float16>(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return __half_as_ushort(pair.x) | static_cast<std::uint32_t>(__half_as_ushort(pair.y)) << 16;
}

/// Eight elements as they lie in memory. In words, for elements of 16 bits would take a register
/// each.
template <typename T>
struct Packed {
  static constexpr int kPerWord = sizeof(std::uint32_t) / sizeof(T);
  static constexpr int kBits = 32 / kPerWord;  ///< of an element

  Pack<std::uint32_t> packs[2 / kPerWord];

  __device__ std::uint32_t& word(int i) { return packs[i / 4].element[i % 4]; }
  __device__ T element(int i) const {
    const std::uint32_t word = packs[i / kPerWord / 4].element[i / kPerWord % 4];
    if constexpr (kPerWord == 1) {
      return __uint_as_float(word);
    } else {
      return T{static_cast<std::uint16_t>(word >> (kBits * (i % kPerWord)))};
    }
  }
  __device__ float operator[](int i) const { return widen(element(i)); }
  __device__ void clear(int i) {
    word(i / kPerWord) &= ~(0xffffffffu >> (32 - kBits) << (kBits * (i % kPerWord)));
  }
  /// For elements that are still 0.
  __device__ void set(int i, T value) {
    word(i / kPerWord) |= bits_of(value) << (kBits * (i % kPerWord));
  }
};

/// Eight values, rounded.
template <typename T>
__device__ inline Packed<T> packed(const Eight& values) {
  Packed<T> result;
#pragma unroll
  for (int i = 0; i < 8; i += Packed<T>::kPerWord) {
    std::uint32_t& word = result.word(i / Packed<T>::kPerWord);
    if constexpr (Packed<T>::kPerWord == 1) {
      word = bits_of(values.value[i]);
    } else {
      word = narrow_pair<T>(values.value[i], values.value[i + 1]);
    }
  }
  return result;
}

}  // namespace bitfall
