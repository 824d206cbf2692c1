// Tangents of attention, as attention_rows.cuh: a warp per row of the scores, keys (or queries)
// taken 32 at a time. Scores are computed again; log_sum_exp is there, so one softmax pass
// suffices.
#pragma once

#include "csrc_cuda/attention_rows.cuh"

namespace bitfall::attention_rows {

/// A quantity and its tangent.
template <typename X>
struct Dual {
  X value, tangent;
};

template <typename T>
struct ForwardTangent {
  Dual<const T*> qkv;
  const float* log_sum_exp;
  T* out_tangent;
  float* log_sum_exp_tangent;
};

template <typename T>
struct BackwardTangent {
  Dual<const T*> qkv, dout;
  Dual<const float*> log_sum_exp, delta;  ///< delta [T, A]: inner products of dout and out
  T* dqkv_tangent;
};

using ForwardMemory = WarpMemory<3, 2>;
using QueryMemory = WarpMemory<5, 2>;
using KeyMemory = WarpMemory<6, 4>;

template <typename T>
__device__ inline Dual<const T*> offset(const Dual<const T*>& data, std::int64_t elements) {
  return {data.value + elements, data.tangent + elements};
}

template <typename T>
__device__ inline void load_vectors(const Dual<const T*>& row, std::int64_t head_size,
                                    const Dual<float*>& vector) {
  load_vector(row.value, head_size, vector.value);
  load_vector(row.tangent, head_size, vector.tangent);
}

template <typename T>
__device__ inline Dual<float> inner_product(const Dual<float*>& vector, const Dual<const T*>& row,
                                            std::int64_t head_size) {
  return {inner_product(vector.value, row.value, head_size),
          inner_product(vector.tangent, row.value, head_size) +
              inner_product(vector.value, row.tangent, head_size)};
}

/// vector += sum over j < count of the tangent of weights[j] * rows[j].
template <typename T>
__device__ inline void add_rows(const Dual<float*>& weights, int count, const Dual<const T*>& rows,
                                std::int64_t stride, std::int64_t head_size, float* vector) {
  add_rows(weights.tangent, count, rows.value, stride, head_size, 1.0f, vector);
  add_rows(weights.value, count, rows.tangent, stride, head_size, 1.0f, vector);
}

/// Tangents of out and log_sum_exp: a warp per query.
template <typename T>
__global__ void forward_tangent_kernel(AttentionProblem problem, ForwardTangent<T> data) {
  const SequencePart part = sequence_part(problem, blockIdx.x, static_cast<int>(blockDim.y));
  const int query = part.first + static_cast<int>(threadIdx.y);
  if (query >= part.length) return;  // the whole warp; nothing below waits for the block
  const std::int64_t head = blockIdx.y, size = problem.head_size, token = part.row + query;
  const HeadColumns columns(problem, head);
  const Dual<const T*> rows = offset(data.qkv, part.row * columns.stride);
  const ForwardMemory memory(size);
  const Dual<float*> q{memory.vector[0], memory.vector[1]}, p{memory.lanes[0], memory.lanes[1]};
  float* const out = memory.vector[2];
  load_vectors(offset(rows, query * columns.stride + columns.q), size, q);
  clear_vector(size, out);
  __syncwarp();

  const float log_sum_exp = data.log_sum_exp[token * problem.heads + head];
  // Probability of a key, and the tangent of its score.
  const auto probability = [&](int key) -> Dual<float> {
    if (key >= part.key_length) return {0.0f, 0.0f};
    const Dual<float> score =
        inner_product(q, offset(rows, key * columns.stride + columns.k), size);
    return {expf(problem.scale * score.value - log_sum_exp), problem.scale * score.tangent};
  };
  float sum = 0.0f;
  for (int key = static_cast<int>(threadIdx.x); key < part.key_length; key += kWarpThreads) {
    const Dual<float> of_key = probability(key);
    sum += of_key.value * of_key.tangent;
  }
  const float log_sum_exp_tangent = warp_sum(sum);
  for (int base = 0; base < part.key_length; base += kWarpThreads) {
    const Dual<float> of_key = probability(base + static_cast<int>(threadIdx.x));
    p.value[threadIdx.x] = of_key.value;
    p.tangent[threadIdx.x] = of_key.value * (of_key.tangent - log_sum_exp_tangent);
    __syncwarp();
    add_rows(p, min(kWarpThreads, part.key_length - base),
             offset(rows, base * columns.stride + columns.v), columns.stride, size, out);
    __syncwarp();
  }
  store_vector(out, 1.0f, size, data.out_tangent + token * problem.hidden_size() + head * size);
  if (threadIdx.x == 0)
    data.log_sum_exp_tangent[token * problem.heads + head] = log_sum_exp_tangent;
}

/// Tangent of delta_kernel's delta: a warp per token.
template <typename T>
__global__ void delta_tangent_kernel(AttentionProblem problem, Dual<const T*> dout,
                                     Dual<const T*> out, float* delta_tangent) {
  const std::int64_t token = static_cast<std::int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (token >= problem.tokens) return;  // the whole warp
  const std::int64_t head = blockIdx.y;
  const std::int64_t first = token * problem.hidden_size() + head * problem.head_size;
  float sum = 0.0f;
  for (std::int64_t d = threadIdx.x; d < problem.head_size; d += kWarpThreads) {
    sum += widen(dout.tangent[first + d]) * widen(out.value[first + d]) +
           widen(dout.value[first + d]) * widen(out.tangent[first + d]);
  }
  sum = warp_sum(sum);
  if (threadIdx.x == 0) delta_tangent[token * problem.heads + head] = sum;
}

/// Probability p of a (query, key) and dscore = p (dp - delta), before the scale, with tangents.
struct ScoreGradients {
  Dual<float> p, dscore;
};

/// `score` unscaled; `at` = token of the query * heads + head.
template <typename T>
__device__ inline ScoreGradients score_gradients(const AttentionProblem& problem,
                                                 const BackwardTangent<T>& data, std::int64_t at,
                                                 const Dual<float>& score, const Dual<float>& dp) {
  const float p = expf(problem.scale * score.value - data.log_sum_exp.value[at]);
  const float p_tangent = p * (problem.scale * score.tangent - data.log_sum_exp.tangent[at]);
  const float change = dp.value - data.delta.value[at];
  const float change_tangent = dp.tangent - data.delta.tangent[at];
  return {{p, p_tangent}, {p * change, p_tangent * change + p * change_tangent}};
}

/// Tangent of the gradient of q: a warp per query.
template <typename T>
__global__ void query_tangent_kernel(AttentionProblem problem, BackwardTangent<T> data) {
  const SequencePart part = sequence_part(problem, blockIdx.x, static_cast<int>(blockDim.y));
  const int query = part.first + static_cast<int>(threadIdx.y);
  if (query >= part.length) return;  // the whole warp; nothing below waits for the block
  const std::int64_t head = blockIdx.y, size = problem.head_size, token = part.row + query;
  const HeadColumns columns(problem, head);
  const Dual<const T*> rows = offset(data.qkv, part.row * columns.stride);
  const QueryMemory memory(size);
  const Dual<float*> q{memory.vector[0], memory.vector[1]};
  const Dual<float*> dout{memory.vector[2], memory.vector[3]};
  const Dual<float*> dscores{memory.lanes[0], memory.lanes[1]};
  float* const dq = memory.vector[4];
  load_vectors(offset(rows, query * columns.stride + columns.q), size, q);
  load_vectors(offset(data.dout, token * problem.hidden_size() + head * size), size, dout);
  clear_vector(size, dq);
  __syncwarp();

  for (int base = 0; base < part.key_length; base += kWarpThreads) {
    const int key = base + static_cast<int>(threadIdx.x);
    ScoreGradients gradients{};
    if (key < part.key_length) {
      const Dual<const T*> row = offset(rows, key * columns.stride);
      gradients = score_gradients(problem, data, token * problem.heads + head,
                                  inner_product(q, offset(row, columns.k), size),
                                  inner_product(dout, offset(row, columns.v), size));
    }
    dscores.value[threadIdx.x] = gradients.dscore.value;
    dscores.tangent[threadIdx.x] = gradients.dscore.tangent;
    __syncwarp();
    add_rows(dscores, min(kWarpThreads, part.key_length - base),
             offset(rows, base * columns.stride + columns.k), columns.stride, size, dq);
    __syncwarp();
  }
  store_vector(dq, problem.scale, size, data.dqkv_tangent + token * columns.stride + columns.q);
}

/// Tangents of the gradients of k and v: a warp per key.
template <typename T>
__global__ void key_tangent_kernel(AttentionProblem problem, BackwardTangent<T> data) {
  const SequencePart part = sequence_part(problem, blockIdx.x, static_cast<int>(blockDim.y));
  const int key = part.first + static_cast<int>(threadIdx.y);
  if (key >= part.length) return;  // the whole warp; nothing below waits for the block
  const std::int64_t head = blockIdx.y, size = problem.head_size, hidden = problem.hidden_size();
  const HeadColumns columns(problem, head);
  const Dual<const T*> rows = offset(data.qkv, part.row * columns.stride);
  const Dual<const T*> douts = offset(data.dout, part.row * hidden + head * size);
  const KeyMemory memory(size);
  const Dual<float*> k{memory.vector[0], memory.vector[1]}, v{memory.vector[2], memory.vector[3]};
  float *const dk = memory.vector[4], *const dv = memory.vector[5];
  const Dual<float*> dscores{memory.lanes[0], memory.lanes[1]}, p{memory.lanes[2], memory.lanes[3]};
  load_vectors(offset(rows, key * columns.stride + columns.k), size, k);
  load_vectors(offset(rows, key * columns.stride + columns.v), size, v);
  clear_vector(size, dk);
  clear_vector(size, dv);
  __syncwarp();

  // Nobody attends to a key behind key_length.
  const int queries = key < part.key_length ? part.length : 0;
  for (int base = 0; base < queries; base += kWarpThreads) {
    const int query = base + static_cast<int>(threadIdx.x);
    ScoreGradients gradients{};
    if (query < queries) {
      gradients =
          score_gradients(problem, data, (part.row + query) * problem.heads + head,
                          inner_product(k, offset(rows, query * columns.stride + columns.q), size),
                          inner_product(v, offset(douts, query * hidden), size));
    }
    dscores.value[threadIdx.x] = gradients.dscore.value;
    dscores.tangent[threadIdx.x] = gradients.dscore.tangent;
    p.value[threadIdx.x] = gradients.p.value;
    p.tangent[threadIdx.x] = gradients.p.tangent;
    __syncwarp();
    const int count = min(kWarpThreads, queries - base);
    add_rows(dscores, count, offset(rows, base * columns.stride + columns.q), columns.stride, size,
             dk);
    add_rows(p, count, offset(douts, base * hidden), hidden, size, dv);
    __syncwarp();
  }
  T* const gradient = data.dqkv_tangent + (part.row + key) * columns.stride;
  store_vector(dk, problem.scale, size, gradient + columns.k);
  store_vector(dv, 1.0f, size, gradient + columns.v);
}

}  // namespace bitfall::attention_rows
