// Tangents of attention of one head of one sequence; see attention.h.
#pragma once

#include "csrc_cpu/kernels/attention.h"

namespace bitfall {

/// One head and the tangents of its operands: the same sizes and strides, no dropout.
///
/// Forward reads q, k, v of both and value.log_sum_exp, and writes tangent.out and
/// tangent.log_sum_exp. Backward reads these and dout of both, too, and writes tangent.dq, dk, dv.
struct AttentionHeadTangent {
  AttentionHead value, tangent;
};

/// As AttentionKernels.
struct AttentionTangentKernels {
  std::size_t (*forward_scratch_bytes)(DType dtype, std::int64_t length, std::int64_t head_size);
  std::size_t (*backward_scratch_bytes)(DType dtype, std::int64_t length, std::int64_t head_size);
  void (*forward)(DType dtype, const AttentionHeadTangent& head, void* scratch);
  void (*backward)(DType dtype, const AttentionHeadTangent& head, void* scratch);
};

}  // namespace bitfall
