// The forward pass of attention_tiles.cuh: a block per 64 queries of a head, online softmax over
// tiles of 64 keys.
#pragma once

#include "csrc_cuda/attention_tiles.cuh"

namespace bitfall::attention_tiles {

inline constexpr int kForwardQueries = 64;  ///< of a block
inline constexpr int kForwardThreads = kForwardQueries / kWarpRows * kWarpThreads;
template <int kDepth>
inline constexpr int kForwardBytes = 3 * tile_bytes(kKeys, kDepth);
static_assert(kForwardQueries == kKeys);

/// What is known of this lane's two rows: their maximum (in powers of two) and sum so far.
struct RowStates {
  float largest[2] = {-INFINITY, -INFINITY}, total[2] = {0.0f, 0.0f};
};

/// Turns scores of `count` keys, times `factor`, into 2^(score - largest). Returns what earlier
/// results of this lane's rows must be multiplied by.
__device__ inline float2 softmax(Sums<kKeys>& scores, float factor, int count, RowStates& state) {
  float correction[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float largest = -INFINITY;
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        float& score = scores.block[n][2 * r + j];
        if (8 * n + sum_column() + j >= count) score = -INFINITY;
        largest = fmaxf(largest, score);
      }
    }
    const float new_largest = fmaxf(state.largest[r], factor * row_max(largest));
    float total = 0.0f;
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        float& p = scores.block[n][2 * r + j];
        p = exp2_approximate(factor * p - new_largest);
        total += p;
      }
    }
    correction[r] = exp2_approximate(state.largest[r] - new_largest);
    state.total[r] = state.total[r] * correction[r] + row_sum(total);
    state.largest[r] = new_largest;
  }
  return {correction[0], correction[1]};
}

__device__ inline void drop(std::uint32_t kept, Sums<kKeys>& probabilities) {
#pragma unroll
  for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (!is_kept(kept, i / 2, n, i % 2)) probabilities.block[n][i] = 0.0f;
    }
  }
}

/// out = correction * out + probabilities times values, of which `count` rows are there.
template <typename T, int kDepth>
__device__ inline void add_values(const Sums<kKeys>& probabilities, float2 correction, int count,
                                  const T* values, Sums<kDepth>& out) {
  out.multiply(correction);
#pragma unroll
  for (int n = 0; n < kKeys / 16; ++n) {
    if (16 * n >= count) break;
    add_product<T, kDepth>(left_of<T>(probabilities, n), values + 16 * n * stride_of(kDepth), out);
  }
}

/// `staging`: 16 rows of this warp.
template <typename T, int kDepth>
__device__ inline void write_output(const AttentionProblem& problem,
                                    const AttentionForward<T>& data, const SequencePart& part,
                                    std::int64_t head, int first_query, const RowStates& state,
                                    Sums<kDepth>& out, T* staging) {
  const std::int64_t token = part.row + first_query;
  const int count = part.length - first_query;
  const float scale = problem.dropout.scale();
  write_rows<T, kDepth>(out, {scale / state.total[0], scale / state.total[1]}, staging, count,
                        static_cast<int>(problem.head_size),
                        data.out + token * problem.hidden_size() + head * problem.head_size,
                        problem.hidden_size());
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = sum_row() + 8 * r;
    if (sum_column() == 0 && row < count) {
      data.log_sum_exp[(token + row) * problem.heads + head] =
          (state.largest[r] + log2f(state.total[r])) * kLn2;
    }
  }
}

template <typename T, int kDepth>
__global__ void __launch_bounds__(kForwardThreads, kDepth <= 64 ? 4 : 2)
    forward_kernel(AttentionProblem problem, AttentionForward<T> data) {
  const SequencePart part = sequence_part(problem, blockIdx.x, kForwardQueries);
  if (part.first >= part.length) return;  // the whole block
  const std::int64_t head = blockIdx.y;
  const int size = static_cast<int>(problem.head_size);
  const HeadColumns columns(problem, head);
  const T* const rows = data.qkv + part.row * columns.stride;
  SharedMemory memory = shared_memory();
  T* const queries = memory.take<T>(tile_bytes(kForwardQueries, kDepth));
  T* const keys = memory.take<T>(tile_bytes(kKeys, kDepth));
  T* const values = memory.take<T>(tile_bytes(kKeys, kDepth));

  load_tile<kForwardQueries, kDepth, kForwardThreads>(
      rows + part.first * columns.stride + columns.q, columns.stride, part.length - part.first,
      size, queries);
  __syncthreads();
  T* const own_queries = queries + warp() * kWarpRows * stride_of(kDepth);
  Matrices left[kDepth / 16];
#pragma unroll
  for (int k = 0; k < kDepth / 16; ++k)
    left[k] = load_left(own_queries + 16 * k, stride_of(kDepth));
  const int first_query = part.first + warp() * kWarpRows;
  Sums<kDepth> out;
  out.clear();
  RowStates state;
  KeptScores kept;
  for (int first_key = 0; first_key < part.key_length; first_key += kKeys) {
    const T* const tile = rows + first_key * columns.stride;
    const int count = part.key_length - first_key;
    __syncthreads();  // the last tile has been read
    load_tile<kKeys, kDepth, kForwardThreads>(tile + columns.k, columns.stride, count, size, keys);
    load_tile<kKeys, kDepth, kForwardThreads>(tile + columns.v, columns.stride, count, size,
                                              values);
    __syncthreads();
    if (first_query >= part.length) continue;  // the whole warp
    Sums<kKeys> scores = scores_of<kKeys, T, kDepth>([&](int k) { return left[k]; }, keys);
    const float2 correction = softmax(scores, problem.scale * kLog2E, count, state);
    if (first_key % 128 == 0)
      kept = kept_scores(problem.dropout, part.sample_key, head, first_query, first_key);
    drop(kept.of_tile(first_key), scores);
    add_values(scores, correction, count, values, out);
  }
  if (first_query < part.length)
    write_output(problem, data, part, head, first_query, state, out, own_queries);
}

}  // namespace bitfall::attention_tiles
