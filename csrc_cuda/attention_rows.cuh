// Attention for any dtype and head size: a warp per row of the scores, keys (or queries) taken 32
// at a time, online softmax. Every sum runs in a fixed order.
#pragma once

#include <cmath>

#include "csrc_cuda/attention_problem.cuh"
#include "csrc_cuda/reduce.cuh"

namespace bitfall::attention_rows {

inline constexpr int kMostWarps = 4;

/// Shared memory of this warp: f32 vectors of head_size, and beside them arrays of 32.
template <int kVectors = 4, int kLaneNumbers = 2>
struct WarpMemory {
  float* vector[kVectors];
  float* lanes[kLaneNumbers];

  /// How many f32 these are for each warp.
  static __host__ __device__ std::int64_t floats(std::int64_t head_size) {
    return kVectors * head_size + kLaneNumbers * kWarpThreads;
  }

  __device__ explicit WarpMemory(std::int64_t head_size) {
    extern __shared__ float shared_floats[];
    float* next = shared_floats + threadIdx.y * floats(head_size);
    for (float*& pointer : vector) {
      pointer = next;
      next += head_size;
    }
    for (float*& pointer : lanes) {
      pointer = next;
      next += kWarpThreads;
    }
  }
};

template <typename T>
__device__ inline void load_vector(const T* row, std::int64_t head_size, float* vector) {
  for (std::int64_t d = threadIdx.x; d < head_size; d += kWarpThreads) vector[d] = widen(row[d]);
}

__device__ inline void clear_vector(std::int64_t head_size, float* vector) {
  for (std::int64_t d = threadIdx.x; d < head_size; d += kWarpThreads) vector[d] = 0.0f;
}

template <typename T>
__device__ inline void store_vector(const float* vector, float factor, std::int64_t head_size,
                                    T* row) {
  for (std::int64_t d = threadIdx.x; d < head_size; d += kWarpThreads)
    row[d] = narrow<T>(factor * vector[d]);
}

template <typename T>
__device__ inline float inner_product(const float* vector, const T* row, std::int64_t head_size) {
  float sum = 0.0f;
  for (std::int64_t d = 0; d < head_size; d += 8) {
    const Eight values = load_eight(row, d, 0, head_size);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (d + i < head_size) sum += vector[d + i] * values.value[i];
    }
  }
  return sum;
}

/// vector = factor * vector + sum over j < count of weights[j] * rows[j].
template <typename T>
__device__ inline void add_rows(const float* weights, int count, const T* rows, std::int64_t stride,
                                std::int64_t head_size, float factor, float* vector) {
  for (std::int64_t d = threadIdx.x; d < head_size; d += kWarpThreads) {
    float sum = factor * vector[d];
    for (int j = 0; j < count; ++j) sum += weights[j] * widen(rows[j * stride + d]);
    vector[d] = sum;
  }
}

__device__ inline float multiplier(const AttentionProblem& problem, const SequencePart& part,
                                   std::int64_t head, int query, int key) {
  if (!problem.dropout.enabled()) return 1.0f;
  const std::uint32_t bits = dropout_bits(
      problem.dropout, part.sample_key, dropout_row(head, query), static_cast<std::uint32_t>(key));
  return bits < problem.dropout.threshold() ? 0.0f : problem.dropout.scale();
}

template <typename T>
__global__ void forward_kernel(AttentionProblem problem, AttentionForward<T> data) {
  const SequencePart part = sequence_part(problem, blockIdx.x, static_cast<int>(blockDim.y));
  const int query = part.first + static_cast<int>(threadIdx.y);
  if (query >= part.length) return;  // the whole warp; nothing below waits for the block
  const std::int64_t head = blockIdx.y, size = problem.head_size;
  const HeadColumns columns(problem, head);
  const T* const rows = data.qkv + part.row * columns.stride;
  const WarpMemory<> memory(size);
  float *const q = memory.vector[0], *const out = memory.vector[1], *const kept = memory.lanes[0];
  load_vector(rows + query * columns.stride + columns.q, size, q);
  clear_vector(size, out);
  __syncwarp();

  float largest = -INFINITY, total = 0.0f;
  for (int base = 0; base < part.key_length; base += kWarpThreads) {
    const int key = base + static_cast<int>(threadIdx.x);
    const bool exists = key < part.key_length;
    float score = -INFINITY;
    if (exists) {
      score = problem.scale * inner_product(q, rows + key * columns.stride + columns.k, size);
    }
    const float new_largest = fmaxf(largest, warp_max(score));
    const float p = exists ? expf(score - new_largest) : 0.0f;
    const float correction = expf(largest - new_largest);
    total = total * correction + warp_sum(p);
    kept[threadIdx.x] = exists ? p * multiplier(problem, part, head, query, key) : 0.0f;
    __syncwarp();
    const int count = min(kWarpThreads, part.key_length - base);
    add_rows(kept, count, rows + base * columns.stride + columns.v, columns.stride, size,
             correction, out);
    __syncwarp();
    largest = new_largest;
  }
  const std::int64_t token = part.row + query;
  store_vector(out, 1.0f / total, size, data.out + token * problem.hidden_size() + head * size);
  if (threadIdx.x == 0) data.log_sum_exp[token * problem.heads + head] = largest + logf(total);
}

/// delta[token, head] = inner product of dout and out.
template <typename T>
__global__ void delta_kernel(AttentionProblem problem, const T* dout, const T* out, float* delta) {
  const std::int64_t token = static_cast<std::int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (token >= problem.tokens) return;  // the whole warp
  const std::int64_t head = blockIdx.y;
  const std::int64_t offset = token * problem.hidden_size() + head * problem.head_size;
  float sum = 0.0f;
  for (std::int64_t d = threadIdx.x; d < problem.head_size; d += kWarpThreads)
    sum += widen(dout[offset + d]) * widen(out[offset + d]);
  sum = warp_sum(sum);
  if (threadIdx.x == 0) delta[token * problem.heads + head] = sum;
}

/// Gradient of q: a warp per query.
template <typename T>
__global__ void query_gradient_kernel(AttentionProblem problem, AttentionBackward<T> data) {
  const SequencePart part = sequence_part(problem, blockIdx.x, static_cast<int>(blockDim.y));
  const int query = part.first + static_cast<int>(threadIdx.y);
  if (query >= part.length) return;  // the whole warp; nothing below waits for the block
  const std::int64_t head = blockIdx.y, size = problem.head_size;
  const HeadColumns columns(problem, head);
  const T* const rows = data.qkv + part.row * columns.stride;
  const std::int64_t token = part.row + query;
  const WarpMemory<> memory(size);
  float *const q = memory.vector[0], *const dout = memory.vector[1], *const dq = memory.vector[2];
  float* const dscores = memory.lanes[0];
  load_vector(rows + query * columns.stride + columns.q, size, q);
  load_vector(data.dout + token * problem.hidden_size() + head * size, size, dout);
  clear_vector(size, dq);
  __syncwarp();

  const float log_sum_exp = data.log_sum_exp[token * problem.heads + head];
  const float delta = data.delta[token * problem.heads + head];
  for (int base = 0; base < part.key_length; base += kWarpThreads) {
    const int key = base + static_cast<int>(threadIdx.x);
    float dscore = 0.0f;
    if (key < part.key_length) {
      const T* const row = rows + key * columns.stride;
      const float score = problem.scale * inner_product(q, row + columns.k, size);
      const float dp =
          inner_product(dout, row + columns.v, size) * multiplier(problem, part, head, query, key);
      dscore = expf(score - log_sum_exp) * (dp - delta);
    }
    dscores[threadIdx.x] = dscore;
    __syncwarp();
    const int count = min(kWarpThreads, part.key_length - base);
    add_rows(dscores, count, rows + base * columns.stride + columns.k, columns.stride, size, 1.0f,
             dq);
    __syncwarp();
  }
  store_vector(dq, problem.scale, size, data.dqkv + token * columns.stride + columns.q);
}

/// Gradients of k and v: a warp per key.
template <typename T>
__global__ void key_gradient_kernel(AttentionProblem problem, AttentionBackward<T> data) {
  const SequencePart part = sequence_part(problem, blockIdx.x, static_cast<int>(blockDim.y));
  const int key = part.first + static_cast<int>(threadIdx.y);
  if (key >= part.length) return;  // the whole warp; nothing below waits for the block
  const std::int64_t head = blockIdx.y, size = problem.head_size;
  const HeadColumns columns(problem, head);
  const T* const rows = data.qkv + part.row * columns.stride;
  const T* const douts = data.dout + part.row * problem.hidden_size() + head * size;
  const WarpMemory<> memory(size);
  float *const k = memory.vector[0], *const v = memory.vector[1];
  float *const dk = memory.vector[2], *const dv = memory.vector[3];
  float *const dscores = memory.lanes[0], *const kept = memory.lanes[1];
  load_vector(rows + key * columns.stride + columns.k, size, k);
  load_vector(rows + key * columns.stride + columns.v, size, v);
  clear_vector(size, dk);
  clear_vector(size, dv);
  __syncwarp();

  // Nobody attends to a key behind key_length.
  const int queries = key < part.key_length ? part.length : 0;
  for (int base = 0; base < queries; base += kWarpThreads) {
    const int query = base + static_cast<int>(threadIdx.x);
    float dscore = 0.0f, p_kept = 0.0f;
    if (query < queries) {
      const std::int64_t at = (part.row + query) * problem.heads + head;
      const float score =
          problem.scale * inner_product(k, rows + query * columns.stride + columns.q, size);
      const float p = expf(score - data.log_sum_exp[at]);
      const float mask = multiplier(problem, part, head, query, key);
      const float dp = inner_product(v, douts + query * problem.hidden_size(), size) * mask;
      p_kept = p * mask;
      dscore = p * (dp - data.delta[at]);
    }
    dscores[threadIdx.x] = dscore;
    kept[threadIdx.x] = p_kept;
    __syncwarp();
    const int count = min(kWarpThreads, queries - base);
    add_rows(dscores, count, rows + base * columns.stride + columns.q, columns.stride, size, 1.0f,
             dk);
    add_rows(kept, count, douts + base * problem.hidden_size(), problem.hidden_size(), size, 1.0f,
             dv);
    __syncwarp();
  }
  T* const gradient = data.dqkv + (part.row + key) * columns.stride;
  store_vector(dk, problem.scale, size, gradient + columns.k);
  store_vector(dv, 1.0f, size, gradient + columns.v);
}

}  // namespace bitfall::attention_rows
