// What the two directions of the attention kernel share: sizes and scratch of one head, its
// exponential, its dropout.
#pragma once

#include <cstddef>
#include <cstdint>

#include "csrc_cpu/kernels/attention.h"
#include "csrc_cpu/kernels/attention_tiles.h"

namespace bitfall::BITFALL_ISA {
namespace {

/// 2^x for x <= 127, 0 below -126.5; NaN stays NaN. Relative error below 3e-7.
BITFALL_INLINE Floats exp2(Floats x) {
  const Floats clamped = x < -127.0f ? broadcast(-127.0f) : x;
  // Adding 1.5 * 2^23 leaves round(x) in the low mantissa bits (0x4b400000 are its own bits).
  const Floats shifted = clamped + 12582912.0f;
  const Floats r = clamped - (shifted - 12582912.0f);
  // Taylor coefficients of 2^r; |r| <= 1/2.
  Floats p = multiply_add(r, broadcast(1.54035304e-4f), broadcast(1.33335581e-3f));
  p = multiply_add(p, r, broadcast(9.61812911e-3f));
  p = multiply_add(p, r, broadcast(5.55041087e-2f));
  p = multiply_add(p, r, broadcast(2.40226507e-1f));
  p = multiply_add(p, r, broadcast(6.93147181e-1f));
  p = multiply_add(p, r, broadcast(1.0f));
  return p * as_floats((as_ints(shifted) - 0x4b400000 + 127) << 23);
}

constexpr float kLog2E = 1.44269504f;
constexpr std::int64_t kBlockRows = 32;  ///< queries whose whole score rows are in cache together

/// Sizes of the packed operands of one head, in words or f32 elements.
template <typename Format>
struct Sizes {
  std::int64_t length, head_size;
  std::int64_t score_vectors, score_stride;  ///< of one row of scores
  std::int64_t out_vectors, out_stride;      ///< of one row of head_size elements
  std::int64_t row_words;                    ///< of one row packed along head_size
  std::int64_t depth_head, depth_length;     ///< words that hold head_size and length elements
  std::int64_t tile_length;                  ///< length rounded up to whole tiles

  Sizes(std::int64_t length, std::int64_t head_size) : length(length), head_size(head_size) {
    constexpr std::int64_t kPerWord = Format::kPerWord;
    score_vectors = round_up(length, kLanes) / kLanes;
    // An odd number of cache lines keeps the rows of a tile in different cache sets.
    score_stride = 16 * (round_up(length, 16) / 16 | 1);
    out_vectors = round_up(head_size, kLanes) / kLanes;
    out_stride = out_vectors * kLanes;
    depth_head = round_up(head_size, kPerWord) / kPerWord;
    depth_length = round_up(length, kPerWord) / kPerWord;
    row_words = round_up(depth_head, kLanes);
    tile_length = round_up(length, kTileRows);
  }
};

/// Hands out aligned pieces of the thread's scratch; with no memory it only counts.
class Arena {
 public:
  explicit Arena(void* memory) : memory_(static_cast<char*>(memory)) {}
  template <typename T>
  T* take(std::int64_t count) {
    char* piece = memory_ == nullptr ? nullptr : memory_ + used_;
    used_ += static_cast<std::size_t>(round_up(count * static_cast<std::int64_t>(sizeof(T)), 64));
    return reinterpret_cast<T*>(piece);
  }
  std::size_t used() const { return used_; }

 private:
  char* memory_;
  std::size_t used_ = 0;
};

/// Dropout multipliers of 128 columns for one query; ones when dropout is off.
class Multipliers {
 public:
  explicit Multipliers(const AttentionHead& head) : head_(head), enabled_(head.dropout.enabled()) {
    for (std::int64_t i = 0; i < kDropoutBlock; ++i) values_[i] = 1.0f;
  }
  BITFALL_INLINE void compute(std::int64_t query, std::int64_t block) {
    if (!enabled_) return;
    const std::uint32_t position = (head_.head << 16) | static_cast<std::uint32_t>(query);
    dropout_multipliers(head_.dropout, head_.sample_key, position, block, values_);
  }
  BITFALL_INLINE Floats at(std::int64_t column) const {
    return load(values_ + column % kDropoutBlock);
  }

 private:
  const AttentionHead& head_;
  const bool enabled_;
  alignas(64) float values_[kDropoutBlock];
};

/// Scores behind the last key become -infinity, so that their probabilities are 0.
void mask_padding(float* scores, std::int64_t length, std::int64_t vectors) {
  for (std::int64_t column = length; column < vectors * kLanes; ++column) {
    scores[column] = -__builtin_inff();
  }
}

/// Largest lane; unlike a comparison of scalars it needs no lane to leave its register.
BITFALL_INLINE float largest_lane(Floats x) {
#pragma GCC unroll 4
  for (int distance = kLanes / 2; distance > 0; distance /= 2) {
    Words other;
    for (int lane = 0; lane < kLanes; ++lane) {
      other[lane] = static_cast<unsigned>((lane + distance) % kLanes);
    }
    x = max(x, __builtin_shuffle(x, reinterpret_cast<Ints>(other)));
  }
  return x[0];
}

template <typename Format, typename T>
BITFALL_INLINE void write_row(const float* source, float factor, std::int64_t count,
                              T* destination) {
  for_each_vector(count, [&](std::int64_t begin, std::int64_t lanes) {
    const Floats x = load(source + begin) * factor;
    if (lanes == kLanes) {
      Format::store_elements(destination + begin, x);
    } else {
      store_first(destination + begin, x, lanes);
    }
  });
}

template <typename T>
Rows<T> rows_of(const void* first, std::int64_t stride, const AttentionHead& head) {
  return {static_cast<const T*>(first), stride, head.length, head.head_size};
}

/// What Buffers<Format> take for a head; the caller has refused other dtypes.
template <template <typename> class Buffers>
std::size_t scratch_bytes(DType dtype, std::int64_t length, std::int64_t head_size) {
  std::size_t bytes = 0;
  dispatch(dtype, [&](auto tag) {
    using Format = typename WordsOf<typename decltype(tag)::type>::type;
    bytes = Buffers<Format>(Sizes<Format>(length, head_size), nullptr).bytes;
  });
  return bytes;
}

float score_scale(const AttentionHead& head) {
  return 1.0f / __builtin_sqrtf(static_cast<float>(head.head_size));
}

}  // namespace
}  // namespace bitfall::BITFALL_ISA
