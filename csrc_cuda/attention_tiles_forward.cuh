// The forward pass of attention_tiles.cuh: a block per 64 queries of a head, online softmax over
// tiles of 64 keys.
#pragma once

#include "csrc_cuda/attention_tiles.cuh"

namespace bitfall::attention_tiles {

/// Running maximum (in powers of two) and sum of a row; the same in both of its lanes.
struct RowState {
  float largest = -INFINITY, total = 0.0f;
};

/// Takes the scores of one tile into the row's state and writes exp2(score - largest), with
/// dropout, as T to `probabilities`. Returns what earlier results of the row must be multiplied by.
template <typename T>
__device__ inline float softmax_tile(const AttentionProblem& problem, const SequencePart& part,
                                     std::int64_t head, int first_key, const float* scores,
                                     T* probabilities, RowState& state) {
  const ScoreRow at;
  const float factor = problem.scale * kLog2E;
  float p[4][8];
  float largest = -INFINITY;
#pragma unroll
  for (int g = 0; g < 4; ++g) {
    const Eight eight = load_packs(scores + at.row * kScoreStride + at.column(g, 0));
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const bool exists = first_key + at.column(g, i) < part.key_length;
      p[g][i] = exists ? factor * eight.value[i] : -INFINITY;
      largest = fmaxf(largest, p[g][i]);
    }
  }
  const float new_largest = fmaxf(state.largest, row_max(largest));
  const std::uint32_t kept = kept_columns(
      problem.dropout, part.sample_key, dropout_row(head, part.first + at.row), first_key, at.side);
  const float keep_scale = problem.dropout.scale();
  float total = 0.0f;
#pragma unroll
  for (int g = 0; g < 4; ++g) {
    Pack<T> pack;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const bool exists = first_key + at.column(g, i) < part.key_length;
      const float value = exists ? exp2f(p[g][i] - new_largest) : 0.0f;
      total += value;
      const bool keep = (kept >> (8 * g + i)) & 1u;
      pack.element[i] = narrow<T>(value * (keep ? keep_scale : 0.0f));
    }
    *reinterpret_cast<Pack<T>*>(probabilities + at.row * kProbabilityStride + at.column(g, 0)) =
        pack;
  }
  const float correction = exp2f(state.largest - new_largest);
  state.total = state.total * correction + row_sum(total);
  state.largest = new_largest;
  return correction;
}

/// out [16, kDepth] of this warp = correction * out + probabilities times values.
template <typename T, int kDepth>
__device__ inline void add_values(const T* probabilities, const T* values, float correction,
                                  bool is_first, float* out) {
  constexpr int kStride = kResultStride<kDepth>;
  const ScoreRow at;
  const int first = static_cast<int>(threadIdx.x / 32) * kFragment;
  Sums sums[kDepth / kFragment];
  if (is_first) {
    clear(sums);
  } else {
    for (int column = at.side; column < kDepth; column += 2)
      out[at.row * kStride + column] *= correction;
    __syncwarp();
#pragma unroll
    for (int n = 0; n < kDepth / kFragment; ++n) {
      wmma::load_matrix_sync(sums[n], out + first * kStride + n * kFragment, kStride,
                             wmma::mem_row_major);
    }
  }
  multiply_add<RowsA<T>, T, kDepth>(probabilities, values, sums);
#pragma unroll
  for (int n = 0; n < kDepth / kFragment; ++n) {
    wmma::store_matrix_sync(out + first * kStride + n * kFragment, sums[n], kStride,
                            wmma::mem_row_major);
  }
  __syncwarp();
}

template <typename T, int kDepth>
__device__ inline void write_output(const AttentionProblem& problem,
                                    const AttentionForward<T>& data, const SequencePart& part,
                                    std::int64_t head, const RowState& state, const float* out) {
  const ScoreRow at;
  const int query = part.first + at.row;
  if (query >= part.length) return;
  const std::int64_t token = part.row + query;
  T* const row = data.out + token * problem.hidden_size() + head * problem.head_size;
  const float inverse = 1.0f / state.total;
  for (int column = 8 * at.side; column < kDepth; column += 16) {
    Eight values;
#pragma unroll
    for (int i = 0; i < 8; ++i)
      values.value[i] = inverse * out[at.row * kResultStride<kDepth> + column + i];
    store_eight(row, column, 0, problem.head_size, values);
  }
  if (at.side == 0) {
    data.log_sum_exp[token * problem.heads + head] = (state.largest + log2f(state.total)) * kLn2;
  }
}

template <typename T, int kDepth>
__global__ void __launch_bounds__(kThreads)
    forward_kernel(AttentionProblem problem, AttentionForward<T> data) {
  const SequencePart part = sequence_part(problem, blockIdx.x, kRows);
  if (part.first >= part.length) return;  // the whole block
  const std::int64_t head = blockIdx.y;
  const int size = static_cast<int>(problem.head_size);
  const HeadColumns columns(problem, head);
  const T* const rows = data.qkv + part.row * columns.stride;
  SharedMemory memory = shared_memory();
  T* const queries = memory.take<T>(Tile<T, kDepth>::kBytes);
  T* const keys = memory.take<T>(Tile<T, kDepth>::kBytes);
  T* const values = memory.take<T>(Tile<T, kDepth>::kBytes);
  float* const scores = memory.take<float>(kScoreBytes);
  T* const probabilities = memory.take<T>(kProbabilityBytes);
  float* const out = memory.take<float>(kRows * kResultStride<kDepth> * 4);

  load_tile<T, kDepth>(rows + part.first * columns.stride + columns.q, columns.stride,
                       part.length - part.first, size, queries);
  RowState state;
  for (int first_key = 0; first_key < part.key_length; first_key += kRows) {
    const T* const tile = rows + first_key * columns.stride;
    const int count = part.key_length - first_key;
    __syncthreads();  // the last tile has been read
    load_tile<T, kDepth>(tile + columns.k, columns.stride, count, size, keys);
    load_tile<T, kDepth>(tile + columns.v, columns.stride, count, size, values);
    __syncthreads();
    // From here on a warp reads and writes its own 16 rows.
    multiply_scores<T, kDepth>(queries, keys, scores);
    __syncwarp();
    const float correction =
        softmax_tile(problem, part, head, first_key, scores, probabilities, state);
    __syncwarp();
    add_values<T, kDepth>(probabilities, values, correction, first_key == 0, out);
  }
  write_output<T, kDepth>(problem, data, part, head, state, out);
}

}  // namespace bitfall::attention_tiles
