// Launches of attention's kernels over parts of sequences, or tokens, and heads.
#pragma once

#include <algorithm>
#include <cmath>

#include "core/tensor.h"
#include "csrc_cuda/attention_rows.cuh"
#include "csrc_cuda/cuda_utils.h"

namespace bitfall::attention_launch {

inline constexpr std::int64_t kMostHeads = 65535;        ///< blocks along the second axis of a grid
inline constexpr std::int64_t kSharedBytes = 48 * 1024;  ///< what every GPU gives a block unasked

/// A launch over parts of sequences (or tokens) and heads.
struct Launch {
  const char* operation;
  dim3 grid, block;
  std::size_t shared_bytes;
  cudaStream_t stream;
};

/// What a block gets on this GPU if it asks.
inline int most_shared_bytes(int device_index) {
  int bytes = 0;
  cuda_check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device_index),
             "cudaDeviceGetAttribute");
  return bytes;
}

template <typename... Arguments>
void run(const Launch& launch, void (*kernel)(Arguments...), Arguments... arguments) {
  if (launch.shared_bytes > static_cast<std::size_t>(kSharedBytes)) {
    cuda_check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    static_cast<int>(launch.shared_bytes)),
               "cudaFuncSetAttribute");
  }
  kernel<<<launch.grid, launch.block, launch.shared_bytes, launch.stream>>>(arguments...);
  check_launch(launch.operation);
}

inline AttentionProblem make_problem(const char* operation, const AttentionShape& shape,
                                     const Tensor& qkv, const Tensor& sequence_starts,
                                     const Tensor& sample_keys, const Dropout& dropout) {
  AttentionProblem problem{};
  problem.starts = device_data<const std::int32_t>(sequence_starts);
  problem.key_lengths = device_data<const std::int32_t>(shape.key_lengths);
  problem.sample_keys = device_data<const std::int32_t>(sample_keys);
  problem.tokens = qkv.shape[0];
  problem.sequences = sequence_starts.numel() - 1;
  problem.heads = shape.num_attention_heads;
  problem.head_size = shape.head_size;
  problem.scale = 1.0f / std::sqrt(static_cast<float>(shape.head_size));
  problem.dropout = dropout;
  check<ShapeError>(problem.sequences > 0 || problem.tokens == 0, operation, ": ", problem.tokens,
                    " tokens in no sequence: sequence_starts has one entry");
  check<UnsupportedError>(problem.heads <= kMostHeads && problem.tokens <= INT32_MAX, operation,
                          " on cuda: ", problem.heads, " heads and ", problem.tokens,
                          " tokens, expected at most ", kMostHeads, " and ", INT32_MAX,
                          ": use smaller micro-batches");
  return problem;
}

/// Blocks of `warps` warps of attention_rows, one part of `warps` rows each, `warp_floats` f32 of
/// shared memory per warp.
inline Launch rows_launch(const char* operation, const AttentionProblem& problem,
                          std::int64_t warp_floats, cudaStream_t stream) {
  const std::int64_t warp_bytes = warp_floats * 4;
  const std::int64_t warps =
      std::min<std::int64_t>(attention_rows::kMostWarps, kSharedBytes / warp_bytes);
  check<UnsupportedError>(warps > 0, operation, " on cuda: head_size ", problem.head_size,
                          " needs more than ", kSharedBytes,
                          " bytes of shared memory: use a smaller one, or the cpu");
  return {operation,
          dim3(static_cast<unsigned>(sequence_parts(problem, warps)),
               static_cast<unsigned>(problem.heads)),
          dim3(kWarpThreads, static_cast<unsigned>(warps)),
          static_cast<std::size_t>(warps * warp_bytes), stream};
}

/// Blocks of kMostWarps warps, a warp per token and head.
inline Launch tokens_launch(const char* operation, const AttentionProblem& problem,
                            cudaStream_t stream) {
  constexpr std::int64_t kWarps = attention_rows::kMostWarps;
  return {operation,
          dim3(static_cast<unsigned>((problem.tokens + kWarps - 1) / kWarps),
               static_cast<unsigned>(problem.heads)),
          dim3(kWarpThreads, attention_rows::kMostWarps), 0, stream};
}

}  // namespace bitfall::attention_launch
