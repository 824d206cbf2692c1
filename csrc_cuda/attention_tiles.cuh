// Attention in bf16 and f16 on tensor cores, for head sizes up to 128: tiles of 64 queries and 64
// keys in shared memory, scores and sums in f32. Four warps share a tile, 16 rows each. Nothing of
// size S x S leaves the multiprocessor, and every sum runs in a fixed order.
//
// A head size is filled up with zeros to kDepth columns. Rows of shared memory are longer than
// their content, so that neighbouring rows begin in different banks; tile addresses stay
// multiples of 32 bytes, as wmma wants them.
#pragma once

#include <cmath>
#include <type_traits>

#include "csrc_cuda/attention_problem.cuh"
#include "csrc_cuda/fragments.cuh"

namespace bitfall::attention_tiles {

inline constexpr int kRows = 64;  ///< queries, and keys, of a tile
inline constexpr int kWarps = 4;
inline constexpr int kThreads = 32 * kWarps;
inline constexpr int kBlocks = kRows / kFragment;  ///< fragments along a side of the scores

inline constexpr int kScoreStride = kRows + 4;        ///< f32 elements
inline constexpr int kProbabilityStride = kRows + 8;  ///< 16-bit elements
inline constexpr float kLog2E = 1.44269504f, kLn2 = 0.69314718f;

/// Tiles of one kind in shared memory.
template <typename T, int kDepth>
struct Tile {
  static constexpr int kStride = kDepth + 8;  ///< elements
  static constexpr int kBytes = kRows * kStride * static_cast<int>(sizeof(T));
};
inline constexpr int kScoreBytes = kRows * kScoreStride * 4;
inline constexpr int kProbabilityBytes = kRows * kProbabilityStride * 2;
/// f32 tile [kRows, kDepth] of results.
template <int kDepth>
inline constexpr int kResultStride = kDepth + 4;

template <typename T, int kDepth>
inline constexpr int kForwardBytes = 3 * Tile<T, kDepth>::kBytes + kScoreBytes + kProbabilityBytes +
                                     kRows* kResultStride<kDepth> * 4;
template <typename T, int kDepth>
inline constexpr int kBackwardBytes =
    4 * Tile<T, kDepth>::kBytes + 2 * kScoreBytes + 2 * kProbabilityBytes + 2 * kRows * 4;

/// Hands out a block's shared memory piece by piece.
struct SharedMemory {
  unsigned char* next;

  template <typename Element>
  __device__ Element* take(int bytes) {
    Element* const piece = reinterpret_cast<Element*>(next);
    next += bytes;
    return piece;
  }
};

__device__ inline SharedMemory shared_memory() {
  extern __shared__ __align__(128) unsigned char shared_bytes[];
  return {shared_bytes};
}

/// tile [kRows, kDepth] = `count` rows of `head_size` elements that lie `stride` apart, zeros
/// around them. All threads take part; they must wait for each other before they read the tile.
template <typename T, int kDepth>
__device__ inline void load_tile(const T* rows, std::int64_t stride, int count, int head_size,
                                 T* tile) {
  for (int item = static_cast<int>(threadIdx.x); item < kRows * (kDepth / 8); item += kThreads) {
    const int row = item / (kDepth / 8), column = item % (kDepth / 8) * 8;
    Pack<T> pack{};
    if (row < count) {
      const T* const source = rows + row * stride;
      if (whole(source, column, 0, head_size)) {
        pack = *reinterpret_cast<const Pack<T>*>(source + column);
      } else {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          if (column + i < head_size) pack.element[i] = source[column + i];
        }
      }
    }
    *reinterpret_cast<Pack<T>*>(tile + row * Tile<T, kDepth>::kStride + column) = pack;
  }
}

/// scores [16, 64] of this warp = its 16 rows of `left` times all rows of `right`, transposed.
template <typename T, int kDepth>
__device__ inline void multiply_scores(const T* left, const T* right, float* scores) {
  constexpr int kStride = Tile<T, kDepth>::kStride;
  const int first = static_cast<int>(threadIdx.x / 32) * kFragment;
  Sums sums[kBlocks];
#pragma unroll
  for (int n = 0; n < kBlocks; ++n) wmma::fill_fragment(sums[n], 0.0f);
#pragma unroll
  for (int depth = 0; depth < kDepth; depth += kFragment) {
    RowsA<T> a;
    load_fragment(a, left + first * kStride + depth, kStride);
#pragma unroll
    for (int n = 0; n < kBlocks; ++n) {
      ColumnsB<T> b;
      load_fragment(b, right + n * kFragment * kStride + depth, kStride);
      wmma::mma_sync(sums[n], a, b, sums[n]);
    }
  }
#pragma unroll
  for (int n = 0; n < kBlocks; ++n) {
    wmma::store_matrix_sync(scores + first * kScoreStride + n * kFragment, sums[n], kScoreStride,
                            wmma::mem_row_major);
  }
}

/// sums [16, kDepth] += this warp's 16 rows of left [64, 64] times right [64, kDepth]. FragmentA is
/// RowsA, or ColumnsA to take 16 columns of `left` for rows.
template <typename FragmentA, typename T, int kDepth>
__device__ inline void multiply_add(const T* left, const T* right,
                                    Sums (&sums)[kDepth / kFragment]) {
  constexpr int kStride = Tile<T, kDepth>::kStride;
  constexpr bool kTransposed = std::is_same_v<FragmentA, ColumnsA<T>>;
  const int first = static_cast<int>(threadIdx.x / 32) * kFragment;
#pragma unroll
  for (int inner = 0; inner < kRows; inner += kFragment) {
    FragmentA a;
    load_fragment(a,
                  kTransposed ? left + inner * kProbabilityStride + first
                              : left + first * kProbabilityStride + inner,
                  kProbabilityStride);
#pragma unroll
    for (int n = 0; n < kDepth / kFragment; ++n) {
      RowsB<T> b;
      load_fragment(b, right + inner * kStride + n * kFragment, kStride);
      wmma::mma_sync(sums[n], a, b, sums[n]);
    }
  }
}

template <int kCount>
__device__ inline void clear(Sums (&sums)[kCount]) {
#pragma unroll
  for (int n = 0; n < kCount; ++n) wmma::fill_fragment(sums[n], 0.0f);
}

/// Writes this warp's 16 rows of sums, times `factor`, to the rows first_row + 16 warp + i < length
/// of a matrix, by way of `staging` [kRows, kResultStride], whose 16 rows belong to this warp.
template <typename T, int kDepth>
__device__ inline void write_rows(Sums (&sums)[kDepth / kFragment], float factor, float* staging,
                                  int first_row, int length, int head_size, T* rows,
                                  std::int64_t stride) {
  constexpr int kStride = kResultStride<kDepth>;
  const int first = static_cast<int>(threadIdx.x / 32) * kFragment;
  const int lane = static_cast<int>(threadIdx.x % 32);
#pragma unroll
  for (int n = 0; n < kDepth / kFragment; ++n) {
    wmma::store_matrix_sync(staging + first * kStride + n * kFragment, sums[n], kStride,
                            wmma::mem_row_major);
  }
  __syncwarp();
  for (int item = lane; item < kFragment * (kDepth / 8); item += 32) {
    const int row = first + item / (kDepth / 8), column = item % (kDepth / 8) * 8;
    if (first_row + row >= length) continue;
    Eight values;
#pragma unroll
    for (int i = 0; i < 8; ++i) values.value[i] = factor * staging[row * kStride + column + i];
    store_eight(rows + (first_row + row) * stride, column, 0, head_size, values);
  }
  __syncwarp();
}

// --- rows of scores. Two lanes share a row of a tile: lane 2 r + side has the columns
// 16 g + 8 side + i, g < 4, i < 8, of row r of its warp. So each Philox result serves four columns.

struct ScoreRow {
  int row;   ///< in the tile
  int side;  ///< 0 or 1

  __device__ ScoreRow()
      : row(static_cast<int>(threadIdx.x / 32) * kFragment +
            static_cast<int>(threadIdx.x % 32) / 2),
        side(static_cast<int>(threadIdx.x % 2)) {}
  __device__ int column(int group, int i) const { return 16 * group + 8 * side + i; }
};

/// Bit 8 g + i: whether dropout keeps column(g, i) of a tile whose first key is `first_key`, a
/// multiple of 64.
__device__ inline std::uint32_t kept_columns(const Dropout& dropout, std::uint32_t sample_key,
                                             std::uint32_t position, int first_key, int side) {
  if (!dropout.enabled()) return 0xffffffffu;
  const std::uint32_t threshold = dropout.threshold();
  const bool upper = first_key % 128 != 0;  // of the columns that share a Philox block
  std::uint32_t kept = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const auto counter = static_cast<std::uint32_t>(first_key / 128 * 16 + 8 * side + i);
    const PhiloxBlock block = philox({{counter, position, sample_key, 0}}, dropout.key());
    const std::uint32_t words[2] = {upper ? block.word[2] : block.word[0],
                                    upper ? block.word[3] : block.word[1]};
#pragma unroll
    for (int g = 0; g < 4; ++g) {
      const std::uint32_t bits = (words[g / 2] >> (16 * (g % 2))) & 0xffffu;
      kept |= static_cast<std::uint32_t>(bits >= threshold) << (8 * g + i);
    }
  }
  return kept;
}

/// Sum (or maximum) over the two lanes of a row.
__device__ inline float row_sum(float value) {
  return value + __shfl_xor_sync(0xffffffffu, value, 1);
}
__device__ inline float row_max(float value) {
  return fmaxf(value, __shfl_xor_sync(0xffffffffu, value, 1));
}

}  // namespace bitfall::attention_tiles
