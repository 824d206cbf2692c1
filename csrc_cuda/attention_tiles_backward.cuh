// The backward pass of attention_tiles.cuh, without atomics: a block owns a head of a sequence and
// makes the probabilities again from log_sum_exp, tile of keys by tile of keys, for 128 queries at
// a time.
//
// First each of its eight warps takes 16 queries: dscores of the keys, which it adds to dq. Through
// shared memory they then reach the warps that own 16 keys of dv or dk. dq of 128 queries waits in
// registers for the next tile of keys; of a longer sequence, in memory.
#pragma once

#include "csrc_cuda/attention_tiles.cuh"

namespace bitfall::attention_tiles {

inline constexpr int kQueries = 128;  ///< of a tile
inline constexpr int kBackwardThreads = kQueries / kWarpRows * kWarpThreads;
inline constexpr int kKeyWarps = kKeys / kWarpRows;  ///< that own dv; as many own dk
inline constexpr int kScoreStride = stride_of(kKeys);
static_assert(kBackwardThreads == 2 * kKeyWarps * kWarpThreads);
static_assert(kBackwardThreads == 2 * kQueries);

template <int kDepth>
inline constexpr int kBackwardBytes = 2 * tile_bytes(kQueries, kDepth) +
                                      2 * tile_bytes(kKeys, kDepth) +
                                      2 * tile_bytes(kQueries, kKeys) + 2 * kQueries * 4;

template <typename T, int kDepth>
struct BackwardTiles {
  T *queries, *douts;          ///< [kQueries, kDepth]
  T *keys, *values;            ///< [kKeys, kDepth]
  T *probabilities, *dscores;  ///< [kQueries, kKeys]; probabilities with dropout
  float *log_sum_exp, *delta;  ///< [kQueries]

  __device__ BackwardTiles() {
    SharedMemory memory = shared_memory();
    queries = memory.take<T>(tile_bytes(kQueries, kDepth));
    douts = memory.take<T>(tile_bytes(kQueries, kDepth));
    keys = memory.take<T>(tile_bytes(kKeys, kDepth));
    values = memory.take<T>(tile_bytes(kKeys, kDepth));
    probabilities = memory.take<T>(tile_bytes(kQueries, kKeys));
    dscores = memory.take<T>(tile_bytes(kQueries, kKeys));
    log_sum_exp = memory.take<float>(kQueries * 4);
    delta = memory.take<float>(kQueries * 4);
  }
};

/// One head of one sequence, whose gradients a block makes.
template <typename T, int kDepth>
class BackwardHead {
 public:
  __device__ BackwardHead(const AttentionProblem& problem, const AttentionBackward<T>& data,
                          const SequencePart& sequence, std::int64_t head)
      : problem_(problem),
        data_(data),
        sequence_(sequence),
        head_(head),
        columns_(problem, head),
        size_(static_cast<int>(problem.head_size)) {}

  __device__ void run() {
    for (int first_key = 0; first_key < sequence_.length; first_key += kKeys) {
      __syncthreads();  // the last tile of keys has been written
      load_keys(first_key);
      dkv_.clear();
      for (int first_query = 0; first_query < sequence_.length; first_query += kQueries)
        take_queries(first_query, first_key);
      write_key_gradients(first_key);
    }
  }

 private:
  static constexpr int kStride = stride_of(kDepth);
  static constexpr int kHalf = kKeys / 2;  ///< columns of scores in registers at a time

  __device__ void load_keys(int first_key) {
    const T* const tile = data_.qkv + (sequence_.row + first_key) * columns_.stride;
    const int count = sequence_.key_length - first_key;
    load_tile<kKeys, kDepth, kBackwardThreads>(tile + columns_.k, columns_.stride, count, size_,
                                               tiles_.keys);
    load_tile<kKeys, kDepth, kBackwardThreads>(tile + columns_.v, columns_.stride, count, size_,
                                               tiles_.values);
  }

  __device__ void load_queries(int first_query) {
    const std::int64_t token = sequence_.row + first_query, hidden = problem_.hidden_size();
    const int count = sequence_.length - first_query;
    load_tile<kQueries, kDepth, kBackwardThreads>(data_.qkv + token * columns_.stride + columns_.q,
                                                  columns_.stride, count, size_, tiles_.queries);
    load_tile<kQueries, kDepth, kBackwardThreads>(data_.dout + token * hidden + columns_.q, hidden,
                                                  count, size_, tiles_.douts);
    load_row_numbers(token, count);
  }

  /// log_sum_exp, and delta: the inner product of dout and out. Two threads share a row.
  __device__ void load_row_numbers(std::int64_t token, int count) {
    const int row = static_cast<int>(threadIdx.x / 2), side = static_cast<int>(threadIdx.x % 2);
    const std::int64_t offset = (token + row) * problem_.hidden_size() + columns_.q;
    float delta = 0.0f;
    if (row < count) {
#pragma unroll 1
      for (int column = 8 * side; column < size_; column += 16) {
        const Eight out = load_eight(data_.out + offset, column, 0, size_);
        const Eight dout = load_eight(data_.dout + offset, column, 0, size_);
#pragma unroll
        for (int i = 0; i < 8; ++i) delta += out.value[i] * dout.value[i];
      }
    }
    delta += __shfl_xor_sync(kWholeWarp, delta, 1);
    if (side != 0) return;
    tiles_.delta[row] = delta;
    // Rows behind the sequence get the probability exp2(-inf) = 0.
    tiles_.log_sum_exp[row] =
        row < count ? data_.log_sum_exp[(token + row) * problem_.heads + head_] : INFINITY;
  }

  /// A tile of queries and one of keys.
  __device__ void take_queries(int first_query, int first_key) {
    const bool stays = sequence_.length <= kQueries;
    if (!stays || first_key == 0) {
      __syncthreads();  // the last tile of queries has been read
      load_queries(first_query);
    }
    __syncthreads();
    const int own_query = first_query + warp() * kWarpRows;
    const bool is_there = own_query < sequence_.length;
    if (is_there) {
      if (!stays || first_key % 128 == 0)
        kept_ = kept_scores(problem_.dropout, sequence_.sample_key, head_, own_query,
                            first_key / 128 * 128);
      fetch_query_gradients(own_query, first_key, stays);
      make_dscores(first_key);
    }
    __syncthreads();
    add_key_gradients(sequence_.length - first_query);
    if (first_key + kKeys < sequence_.length) {
      if (is_there && !stays)
        visit_waiting(own_query, [](float sum, float& waiting) { waiting = sum; });
      return;
    }
    __syncthreads();  // the queries have been read: their memory is free
    if (is_there) write_query_gradients(own_query);
  }

  /// Probabilities and dscores = p (dropout(dp) - delta) of this warp's queries, and its part of
  /// dq.
  __device__ void make_dscores(int first_key) {
    const int row = warp() * kWarpRows, count = sequence_.key_length - first_key;
    const float factor = problem_.scale * kLog2E, keep_scale = problem_.dropout.scale();
    const std::uint32_t kept = kept_.of_tile(first_key);
    float shift[2], delta[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      shift[r] = tiles_.log_sum_exp[row + sum_row() + 8 * r] * kLog2E;
      delta[r] = tiles_.delta[row + sum_row() + 8 * r];
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const T* const keys = tiles_.keys + half * kHalf * kStride;
      Sums<kHalf> p = scores_of<kHalf, T, kDepth>(left_rows(tiles_.queries), keys);
      Sums<kHalf> dp = scores_of<kHalf, T, kDepth>(left_rows(tiles_.douts),
                                                   tiles_.values + half * kHalf * kStride);
#pragma unroll
      for (int n = 0; n < kHalf / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int block = half * (kHalf / 8) + n, r = i / 2, j = i % 2;
          const bool exists = 8 * block + sum_column() + j < count;
          const float mask = is_kept(kept, r, block, j) ? keep_scale : 0.0f;
          const float probability =
              exists ? exp2_approximate(factor * p.block[n][i] - shift[r]) : 0.0f;
          const float dscore = probability * (dp.block[n][i] * mask - delta[r]);
          p.block[n][i] = probability * mask;
          dp.block[n][i] = exists ? dscore : 0.0f;
        }
      }
      const int target = row * kScoreStride + half * kHalf;
      store_sums(p, tiles_.probabilities + target, kScoreStride);
      store_sums(dp, tiles_.dscores + target, kScoreStride);
#pragma unroll
      for (int n = 0; n < kHalf / 16; ++n)
        add_product<T, kDepth>(left_of<T>(dp, n), keys + 16 * n * kStride, dq_);
    }
  }

  /// This warp's 16 rows of a tile as left factor.
  __device__ auto left_rows(const T* tile) const {
    const T* const rows = tile + warp() * kWarpRows * kStride;
    return [rows](int k) { return load_left(rows + 16 * k, kStride); };
  }

  /// dk or dv of this warp's 16 keys, from up to `count` queries of the tile.
  __device__ void add_key_gradients(int count) {
    const int key = warp() % kKeyWarps * kWarpRows;
    const T* const left = (owns_dk() ? tiles_.dscores : tiles_.probabilities) + key;
    const T* const right = owns_dk() ? tiles_.queries : tiles_.douts;
    for (int query = 0; query < min(count, kQueries); query += kWarpRows) {
      add_product<T, kDepth>(load_left_transposed(left + query * kScoreStride, kScoreStride),
                             right + query * kStride, dkv_);
    }
  }
  __device__ static bool owns_dk() { return warp() >= kKeyWarps; }

  __device__ void write_key_gradients(int first_key) {
    const int key = warp() % kKeyWarps * kWarpRows, count = sequence_.length - first_key - key;
    const float scale = owns_dk() ? problem_.scale : 1.0f;
    T* const gradient = data_.dqkv + (sequence_.row + first_key + key) * columns_.stride +
                        (owns_dk() ? columns_.k : columns_.v);
    // Of these tiles the warps have taken what they need.
    T* const staging = (owns_dk() ? tiles_.keys : tiles_.values) + key * kStride;
    write_rows<T, kDepth>(dkv_, {scale, scale}, staging, count, size_, gradient, columns_.stride);
  }

  __device__ void write_query_gradients(int own_query) {
    write_rows<T, kDepth>(
        dq_, {problem_.scale, problem_.scale}, tiles_.queries + warp() * kWarpRows * kStride,
        sequence_.length - own_query, size_,
        data_.dqkv + (sequence_.row + own_query) * columns_.stride + columns_.q, columns_.stride);
  }

  __device__ void fetch_query_gradients(int own_query, int first_key, bool stays) {
    if (first_key == 0) return dq_.clear();
    if (!stays) visit_waiting(own_query, [](float& sum, float waiting) { sum = waiting; });
  }

  /// Calls `visit` with each sum of dq and where it waits.
  template <typename Visit>
  __device__ void visit_waiting(int own_query, const Visit& visit) {
#pragma unroll
    for (int n = 0; n < kDepth / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int query = own_query + sum_row() + 8 * (i / 2),
                  column = 8 * n + sum_column() + i % 2;
        if (query >= sequence_.length || column >= size_) continue;
        visit(dq_.block[n][i],
              data_.dq[(sequence_.row + query) * problem_.hidden_size() + columns_.q + column]);
      }
    }
  }

  const AttentionProblem problem_;
  const AttentionBackward<T> data_;
  const SequencePart sequence_;
  const std::int64_t head_;
  const HeadColumns columns_;
  const int size_;
  const BackwardTiles<T, kDepth> tiles_;
  Sums<kDepth> dq_, dkv_;
  KeptScores kept_;
};

/// Block (sequence, head).
template <typename T, int kDepth>
__global__ void __launch_bounds__(kBackwardThreads, kDepth <= 64 ? 2 : 1)
    backward_kernel(AttentionProblem problem, AttentionBackward<T> data) {
  const SequencePart sequence = part_of_sequence(problem, blockIdx.x, 0);
  if (sequence.length == 0) return;  // the whole block
  BackwardHead<T, kDepth>(problem, data, sequence, blockIdx.y).run();
}

}  // namespace bitfall::attention_tiles
