// The backward pass of attention_tiles.cuh, without atomics: one kernel owns the gradients of 64
// keys and walks the queries, another owns those of 64 queries and walks the keys. Both make the
// probabilities again from log_sum_exp.
#pragma once

#include "csrc_cuda/attention_tiles.cuh"

namespace bitfall::attention_tiles {

/// Shared memory of both kernels.
template <typename T, int kDepth>
struct BackwardMemory {
  T *queries, *douts, *keys, *values;
  float *scores, *dprobabilities;  ///< one behind the other; later `staging` of write_rows
  T *probabilities, *dscores;
  float *log_sum_exp, *delta;  ///< [kRows] of the queries of the tile

  __device__ BackwardMemory() {
    SharedMemory memory = shared_memory();
    queries = memory.take<T>(Tile<T, kDepth>::kBytes);
    douts = memory.take<T>(Tile<T, kDepth>::kBytes);
    keys = memory.take<T>(Tile<T, kDepth>::kBytes);
    values = memory.take<T>(Tile<T, kDepth>::kBytes);
    scores = memory.take<float>(kScoreBytes);
    dprobabilities = memory.take<float>(kScoreBytes);
    probabilities = memory.take<T>(kProbabilityBytes);
    dscores = memory.take<T>(kProbabilityBytes);
    log_sum_exp = memory.take<float>(kRows * 4);
    delta = memory.take<float>(kRows * 4);
  }
  static_assert(kRows * kResultStride<kDepth> * 4 <= 2 * kScoreBytes);
};

/// What a block works on.
template <typename T>
struct HeadRows {
  HeadColumns columns;
  std::int64_t head, hidden_size;
  int head_size;
  const T *qkv, *dout;  ///< first row of the sequence; dout at the first column of the head

  __device__ HeadRows(const AttentionProblem& problem, const AttentionBackward<T>& data,
                      const SequencePart& part, std::int64_t head)
      : columns(problem, head),
        head(head),
        hidden_size(problem.hidden_size()),
        head_size(static_cast<int>(problem.head_size)),
        qkv(data.qkv + part.row * columns.stride),
        dout(data.dout + part.row * hidden_size + head * problem.head_size) {}
};

template <typename T, int kDepth>
__device__ inline void load_queries(const AttentionProblem& problem,
                                    const AttentionBackward<T>& data, const SequencePart& part,
                                    const HeadRows<T>& rows, int first_query,
                                    const BackwardMemory<T, kDepth>& memory) {
  const int count = part.length - first_query;
  load_tile<T, kDepth>(rows.qkv + first_query * rows.columns.stride + rows.columns.q,
                       rows.columns.stride, count, rows.head_size, memory.queries);
  load_tile<T, kDepth>(rows.dout + first_query * rows.hidden_size, rows.hidden_size, count,
                       rows.head_size, memory.douts);
  const int row = static_cast<int>(threadIdx.x);
  if (row >= kRows) return;
  const std::int64_t at = (part.row + first_query + row) * problem.heads + rows.head;
  // Rows behind the sequence get the probability exp2(-inf) = 0.
  memory.log_sum_exp[row] = row < count ? data.log_sum_exp[at] : INFINITY;
  memory.delta[row] = row < count ? data.delta[at] : 0.0f;
}

template <typename T, int kDepth>
__device__ inline void load_keys(const SequencePart& part, const HeadRows<T>& rows, int first_key,
                                 const BackwardMemory<T, kDepth>& memory) {
  const T* const tile = rows.qkv + first_key * rows.columns.stride;
  const int count = part.key_length - first_key;
  load_tile<T, kDepth>(tile + rows.columns.k, rows.columns.stride, count, rows.head_size,
                       memory.keys);
  load_tile<T, kDepth>(tile + rows.columns.v, rows.columns.stride, count, rows.head_size,
                       memory.values);
}

/// The 16 rows of probabilities (with dropout) and dscores = p (dropout(dp) - delta) of this warp,
/// from the tiles in shared memory.
template <typename T, int kDepth>
__device__ inline void score_gradients(const AttentionProblem& problem, const SequencePart& part,
                                       std::int64_t head, int first_query, int first_key,
                                       const BackwardMemory<T, kDepth>& memory) {
  multiply_scores<T, kDepth>(memory.queries, memory.keys, memory.scores);
  multiply_scores<T, kDepth>(memory.douts, memory.values, memory.dprobabilities);
  __syncwarp();
  const ScoreRow at;
  const std::uint32_t kept =
      kept_columns(problem.dropout, part.sample_key, dropout_row(head, first_query + at.row),
                   first_key, at.side);
  const float keep_scale = problem.dropout.scale(), factor = problem.scale * kLog2E;
  const float shift = memory.log_sum_exp[at.row] * kLog2E, delta = memory.delta[at.row];
#pragma unroll
  for (int g = 0; g < 4; ++g) {
    const int source = at.row * kScoreStride + at.column(g, 0);
    const Eight scores = load_packs(memory.scores + source);
    const Eight dprobabilities = load_packs(memory.dprobabilities + source);
    Pack<T> probabilities, dscores;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const bool exists = first_key + at.column(g, i) < part.key_length;
      const float p = exists ? exp2f(factor * scores.value[i] - shift) : 0.0f;
      const float mask = (kept >> (8 * g + i)) & 1u ? keep_scale : 0.0f;
      const float dscore = p * (dprobabilities.value[i] * mask - delta);
      probabilities.element[i] = narrow<T>(p * mask);
      dscores.element[i] = narrow<T>(exists ? dscore : 0.0f);
    }
    const int target = at.row * kProbabilityStride + at.column(g, 0);
    *reinterpret_cast<Pack<T>*>(memory.probabilities + target) = probabilities;
    *reinterpret_cast<Pack<T>*>(memory.dscores + target) = dscores;
  }
  __syncwarp();
}

template <typename T, int kDepth>
__global__ void __launch_bounds__(kThreads)
    key_gradient_kernel(AttentionProblem problem, AttentionBackward<T> data) {
  const SequencePart part = sequence_part(problem, blockIdx.x, kRows);
  if (part.first >= part.length) return;  // the whole block
  const HeadRows<T> rows(problem, data, part, blockIdx.y);
  const BackwardMemory<T, kDepth> memory;
  Sums dk[kDepth / kFragment], dv[kDepth / kFragment];
  clear(dk);
  clear(dv);
  load_keys<T, kDepth>(part, rows, part.first, memory);
  for (int first_query = 0; first_query < part.length; first_query += kRows) {
    __syncthreads();  // the last tile of queries and its scores have been read
    load_queries<T, kDepth>(problem, data, part, rows, first_query, memory);
    __syncthreads();
    score_gradients<T, kDepth>(problem, part, rows.head, first_query, part.first, memory);
    __syncthreads();
    // Warp w has keys 16 w .. 16 w + 15: columns of the scores, summed over all queries.
    multiply_add<ColumnsA<T>, T, kDepth>(memory.probabilities, memory.douts, dv);
    multiply_add<ColumnsA<T>, T, kDepth>(memory.dscores, memory.queries, dk);
  }
  __syncthreads();  // the scores have been read: their memory is free
  T* const gradient = data.dqkv + part.row * rows.columns.stride;
  write_rows<T, kDepth>(dk, problem.scale, memory.scores, part.first, part.length, rows.head_size,
                        gradient + rows.columns.k, rows.columns.stride);
  write_rows<T, kDepth>(dv, 1.0f, memory.scores, part.first, part.length, rows.head_size,
                        gradient + rows.columns.v, rows.columns.stride);
}

template <typename T, int kDepth>
__global__ void __launch_bounds__(kThreads)
    query_gradient_kernel(AttentionProblem problem, AttentionBackward<T> data) {
  const SequencePart part = sequence_part(problem, blockIdx.x, kRows);
  if (part.first >= part.length) return;  // the whole block
  const HeadRows<T> rows(problem, data, part, blockIdx.y);
  const BackwardMemory<T, kDepth> memory;
  Sums dq[kDepth / kFragment];
  clear(dq);
  load_queries<T, kDepth>(problem, data, part, rows, part.first, memory);
  for (int first_key = 0; first_key < part.key_length; first_key += kRows) {
    __syncthreads();  // the last tile of keys has been read
    load_keys<T, kDepth>(part, rows, first_key, memory);
    __syncthreads();
    score_gradients<T, kDepth>(problem, part, rows.head, part.first, first_key, memory);
    multiply_add<RowsA<T>, T, kDepth>(memory.dscores, memory.keys, dq);
  }
  __syncthreads();  // the scores have been read: their memory is free
  write_rows<T, kDepth>(dq, problem.scale, memory.scores, part.first, part.length, rows.head_size,
                        data.dqkv + part.row * rows.columns.stride + rows.columns.q,
                        rows.columns.stride);
}

}  // namespace bitfall::attention_tiles
