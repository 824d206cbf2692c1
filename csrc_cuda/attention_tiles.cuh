// Attention in bf16 and f16 on tensor cores, for head sizes up to 128: tiles of queries and keys in
// shared memory, scores and sums in f32 in registers. A warp owns 16 rows of scores. Nothing of
// size S x S leaves the multiprocessor, and every sum runs in a fixed order.
//
// A head size is filled up with zeros to kDepth columns. Rows of shared memory are 16 bytes longer
// than their content, so that eight neighbouring rows begin in different banks.
#pragma once

#include <cmath>

#include "csrc_cuda/approximate.cuh"
#include "csrc_cuda/attention_problem.cuh"
#include "csrc_cuda/packed.cuh"
#include "csrc_cuda/reduce.cuh"
#include "csrc_cuda/tensor_core.cuh"

namespace bitfall::attention_tiles {

inline constexpr int kWarpRows = 16;
inline constexpr int kKeys = 64;  ///< of a tile
inline constexpr float kLn2 = 0.69314718f;

/// `rows` rows of `columns` 16-bit elements in shared memory.
constexpr int stride_of(int columns) { return columns + 8; }
constexpr int tile_bytes(int rows, int columns) { return rows * stride_of(columns) * 2; }

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

/// Whether rows of a matrix can be read and written eight elements at a time.
template <typename T>
__device__ inline bool in_eights(const T* rows, std::int64_t stride, int head_size) {
  return aligned(rows) && stride % 8 == 0 && head_size % 8 == 0;
}

/// Eight elements on their way.
using EightRaw = Pack<std::uint32_t>;

/// tile [kRows, kDepth] = `count` rows of `head_size` elements that lie `stride` apart, zeros
/// around them. All kThreads threads take part; they must wait for each other before they read it.
template <int kRows, int kDepth, int kThreads, typename T>
__device__ inline void load_tile(const T* rows, std::int64_t stride, int count, int head_size,
                                 T* tile) {
  const int thread = static_cast<int>(threadIdx.x);
  if (in_eights(rows, stride, head_size)) {
    constexpr int kItems = kRows * (kDepth / 8) / kThreads;
    static_assert(kItems * kThreads == kRows * (kDepth / 8));
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const int item = thread + i * kThreads;
      const int row = item / (kDepth / 8), column = item % (kDepth / 8) * 8;
      EightRaw eight{};
      if (row < count && column < head_size)
        eight = *reinterpret_cast<const EightRaw*>(rows + row * stride + column);
      *reinterpret_cast<EightRaw*>(tile + row * stride_of(kDepth) + column) = eight;
    }
    return;
  }
#pragma unroll 1
  for (int item = thread; item < kRows * kDepth; item += kThreads) {
    const int row = item / kDepth, column = item % kDepth;
    const bool exists = row < count && column < head_size;
    tile[row * stride_of(kDepth) + column] = exists ? rows[row * stride + column] : T{};
  }
}

// --- products. A left factor goes in pieces of 16 x 16, a right one in pieces of 16 x 16 for two
// neighbouring blocks of eight columns: words 0 and 1 for the first, 2 and 3 for the second.

__device__ inline int lane() { return static_cast<int>(threadIdx.x % kWarpThreads); }
__device__ inline int warp() { return static_cast<int>(threadIdx.x / kWarpThreads); }

/// Where this lane's row of four matrices begins: first those of the left column, from top to
/// bottom ...
template <typename T>
__device__ inline const T* column_by_column(const T* piece, int stride) {
  return piece + lane() % 16 * stride + lane() / 16 * 8;
}
/// ... or first those of the upper row.
template <typename T>
__device__ inline const T* row_by_row(const T* piece, int stride) {
  return piece + (lane() / 16 * 8 + lane() % 8) * stride + lane() / 8 % 2 * 8;
}

template <typename T>
__device__ inline Matrices load_left(const T* piece, int stride) {
  return load_matrices(column_by_column(piece, stride));
}
template <typename T>
__device__ inline Matrices load_left_transposed(const T* piece, int stride) {
  return load_matrices_transposed(row_by_row(piece, stride));
}
template <typename T>
__device__ inline Matrices load_right(const T* piece, int stride) {
  return load_matrices_transposed(column_by_column(piece, stride));
}
template <typename T>
__device__ inline Matrices load_right_transposed(const T* piece, int stride) {
  return load_matrices(row_by_row(piece, stride));
}

/// 16 rows of results of this lane's warp; see multiply_add for who has what.
template <int kColumns>
struct Sums {
  float block[kColumns / 8][4];

  __device__ void clear() {
#pragma unroll
    for (float(&sums)[4] : block) {
#pragma unroll
      for (float& sum : sums) sum = 0.0f;
    }
  }
  /// Multiplies this lane's two rows.
  __device__ void multiply(float2 factor) {
#pragma unroll
    for (float(&sums)[4] : block) {
      sums[0] *= factor.x;
      sums[1] *= factor.x;
      sums[2] *= factor.y;
      sums[3] *= factor.y;
    }
  }
  /// Adds left [16, 16] times two blocks of columns, 16 n and 16 n + 8.
  template <typename T>
  __device__ void add(int n, const Matrices& left, const Matrices& right) {
    multiply_add<T>(block[2 * n], left, right.word[0], right.word[1]);
    multiply_add<T>(block[2 * n + 1], left, right.word[2], right.word[3]);
  }
};

/// This lane has rows sum_row() and sum_row() + 8 of Sums, of each the columns 8 n + sum_column()
/// and the next one.
__device__ inline int sum_row() { return lane() / 4; }
__device__ inline int sum_column() { return lane() % 4 * 2; }

/// Scores [16, kColumns] = left [16, kDepth] times the first kColumns rows of `right`, transposed.
/// left(k) gives columns 16 k ... 16 k + 15.
template <int kColumns, typename T, int kDepth, typename Left>
__device__ inline Sums<kColumns> scores_of(const Left& left, const T* right) {
  Sums<kColumns> scores;
  scores.clear();
#pragma unroll
  for (int k = 0; k < kDepth / 16; ++k) {
    const Matrices piece = left(k);
#pragma unroll
    for (int n = 0; n < kColumns / 16; ++n) {
      scores.template add<T>(
          n, piece,
          load_right_transposed(right + 16 * n * stride_of(kDepth) + 16 * k, stride_of(kDepth)));
    }
  }
  return scores;
}

/// sums [16, kDepth] += left [16, 16] times 16 rows of a tile.
template <typename T, int kDepth>
__device__ inline void add_product(const Matrices& left, const T* rows, Sums<kDepth>& sums) {
#pragma unroll
  for (int n = 0; n < kDepth / 16; ++n)
    sums.template add<T>(n, left, load_right(rows + 16 * n, stride_of(kDepth)));
}

/// Columns 16 n ... 16 n + 15 as left factor.
template <typename T, int kColumns>
__device__ inline Matrices left_of(const Sums<kColumns>& sums, int n) {
  const float(&first)[4] = sums.block[2 * n], (&second)[4] = sums.block[2 * n + 1];
  return {{narrow_pair<T>(first[0], first[1]), narrow_pair<T>(first[2], first[3]),
           narrow_pair<T>(second[0], second[1]), narrow_pair<T>(second[2], second[3])}};
}

/// Writes 16 rows to a tile whose row 0 is the first of them.
template <typename T, int kColumns>
__device__ inline void store_sums(const Sums<kColumns>& sums, T* tile, int stride) {
#pragma unroll
  for (int n = 0; n < kColumns / 8; ++n) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      *reinterpret_cast<std::uint32_t*>(tile + (sum_row() + 8 * r) * stride + 8 * n +
                                        sum_column()) =
          narrow_pair<T>(sums.block[n][2 * r], sums.block[n][2 * r + 1]);
    }
  }
}

/// Writes the `count` first of this warp's 16 rows of results, times `factor` of each lane's two
/// rows, to memory, by way of `staging` [16, kDepth] of the warp.
template <typename T, int kDepth>
__device__ inline void write_rows(Sums<kDepth>& sums, float2 factor, T* staging, int count,
                                  int head_size, T* rows, std::int64_t stride) {
  sums.multiply(factor);
  store_sums(sums, staging, stride_of(kDepth));
  __syncwarp();
  if (in_eights(rows, stride, head_size)) {
#pragma unroll
    for (int item = lane(); item < kWarpRows * (kDepth / 8); item += kWarpThreads) {
      const int row = item / (kDepth / 8), column = item % (kDepth / 8) * 8;
      if (row < count && column < head_size)
        *reinterpret_cast<EightRaw*>(rows + row * stride + column) =
            *reinterpret_cast<const EightRaw*>(staging + row * stride_of(kDepth) + column);
    }
    return;
  }
#pragma unroll 1
  for (int item = lane(); item < kWarpRows * kDepth; item += kWarpThreads) {
    const int row = item / kDepth, column = item % kDepth;
    if (row < count && column < head_size)
      rows[row * stride + column] = staging[row * stride_of(kDepth) + column];
  }
}

/// Which scores of this lane dropout keeps, for 128 keys: bit 16 r + 2 n + j of the lower 64 keys
/// is that of row sum_row() + 8 r and key 8 n + sum_column() + j; the same of the upper 64.
struct KeptScores {
  std::uint32_t lower = 0xffffffffu, upper = 0xffffffffu;

  /// Of the 64 keys from `first_key` on.
  __device__ std::uint32_t of_tile(int first_key) const {
    return first_key % 128 == 0 ? lower : upper;
  }
};
__device__ inline bool is_kept(std::uint32_t kept, int row, int column_block, int j) {
  return (kept >> (16 * row + 2 * column_block + j)) & 1u;
}

/// first_key: a multiple of 128. Each result of Philox serves eight keys, 16 apart.
__device__ inline KeptScores kept_scores(const Dropout& dropout, std::uint32_t sample_key,
                                         std::int64_t head, int first_query, int first_key) {
  KeptScores kept;
  if (!dropout.enabled()) return kept;
  kept = {0, 0};
  const std::uint32_t threshold = dropout.threshold();
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const std::uint32_t position = dropout_row(head, first_query + sum_row() + 8 * r);
#pragma unroll
    for (int column = 0; column < 4; ++column) {  // 0, 1, 8, 9 behind sum_column()
      const int block = column / 2, j = column % 2;
      const auto counter = static_cast<std::uint32_t>(first_key / 8 + 8 * block + sum_column() + j);
      const PhiloxBlock random = philox({{counter, position, sample_key, 0}}, dropout.key());
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const std::uint32_t bits = random_half(random, i);
        (i < 4 ? kept.lower : kept.upper) |= static_cast<std::uint32_t>(bits >= threshold)
                                             << (16 * r + 2 * (2 * (i % 4) + block) + j);
      }
    }
  }
  return kept;
}

/// Sum, or maximum, over the four lanes that have a row of Sums.
__device__ inline float row_sum(float value) {
  value += __shfl_xor_sync(kWholeWarp, value, 1);
  return value + __shfl_xor_sync(kWholeWarp, value, 2);
}
__device__ inline float row_max(float value) {
  value = fmaxf(value, __shfl_xor_sync(kWholeWarp, value, 1));
  return fmaxf(value, __shfl_xor_sync(kWholeWarp, value, 2));
}

}  // namespace bitfall::attention_tiles
