// Attention of one head of one sequence: the unit of work that attention.cpp hands to a thread.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/dtype.h"
#include "core/rng.h"

namespace bitfall {

/// Operands of one (sequence, head): S = length rows, D = head_size columns, strides in elements
/// between rows. Pointers stand at the first row of the sequence and the first column of the head.
struct AttentionHead {
  std::int64_t length = 0;
  std::int64_t key_length = 0;  ///< 1..length: keys and values behind have probability 0
  std::int64_t head_size = 0;
  std::int64_t qkv_stride = 0;  ///< of q, k, v, dq, dk, dv
  std::int64_t out_stride = 0;  ///< of out, dout
  std::int64_t lse_stride = 0;  ///< of log_sum_exp

  const void* q = nullptr;
  const void* k = nullptr;
  const void* v = nullptr;
  void* out = nullptr;           ///< written by forward, read by backward
  float* log_sum_exp = nullptr;  ///< written by forward, read by backward

  const void* dout = nullptr;  ///< backward only, as dq, dk and dv
  void* dq = nullptr;
  void* dk = nullptr;
  void* dv = nullptr;

  Dropout dropout;
  std::uint32_t sample_key = 0;
  std::uint32_t head = 0;  ///< index a of the head, for the dropout rows (a << 16) | q
};

/// `dtype` is f32, bf16 or f16 and that of every void pointer. `scratch` belongs to the calling
/// thread, is aligned to 64 bytes and may hold anything (the kernels write before they read).
struct AttentionKernels {
  std::size_t (*forward_scratch_bytes)(DType dtype, std::int64_t length, std::int64_t head_size);
  std::size_t (*backward_scratch_bytes)(DType dtype, std::int64_t length, std::int64_t head_size);
  void (*forward)(DType dtype, const AttentionHead& head, void* scratch);
  void (*backward)(DType dtype, const AttentionHead& head, void* scratch);
};

}  // namespace bitfall
