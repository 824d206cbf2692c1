// Layer normalisation on a range of rows; see kernels.h for the rules.
#pragma once

#include <cstdint>

#include "core/backend.h"

namespace bitfall {

/// Rows [begin, end) of the operations in core/backend.h, checked by the caller.
struct LayerNormKernels {
  void (*forward)(const LayerNormForward& args, std::int64_t begin, std::int64_t end);
  /// Adds this range's share of dgamma and dbeta to the f32 rows `dgamma` and `dbeta` [H].
  void (*backward)(const LayerNormBackward& args, std::int64_t begin, std::int64_t end,
                   float* dgamma, float* dbeta);
  void (*forward_tangent)(const LayerNormForwardTangent& args, std::int64_t begin,
                          std::int64_t end);
  /// Adds this range's share of dgamma_tangent and dbeta_tangent to f32 rows [H], unless null.
  void (*backward_tangent)(const LayerNormBackwardTangent& args, std::int64_t begin,
                           std::int64_t end, float* dgamma_tangent, float* dbeta_tangent);
};

}  // namespace bitfall
