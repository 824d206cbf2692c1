// Elementwise loops of the CPU backend and the sums next to them; see kernels.h for the rules.
#pragma once

#include <cstdint>

#include "core/backend.h"

namespace bitfall {

/// `dtype` says what the `void` pointers hold: f32, bf16 or f16. Counts are in elements.
struct ElementwiseKernels {
  /// destination[i] = source[i] converted, round to nearest even.
  void (*cast)(DType from, const void* source, DType to, void* destination, std::int64_t numel);
  /// y = activation(pre_activation).
  void (*activation_forward)(Activation activation, DType dtype, const void* pre_activation,
                             void* y, std::int64_t numel);
  /// dpre = dy * activation'(pre_activation); y, unless null, = activation(pre_activation).
  void (*activation_backward)(Activation activation, DType dtype, const void* pre_activation,
                              const void* dy, void* dpre, void* y, std::int64_t numel);
  /// dpre_tangent = activation'(pre) dy_tangent + activation''(pre) pre_tangent dy.
  void (*activation_backward_tangent)(Activation activation, DType dtype,
                                      const void* pre_activation,
                                      const void* pre_activation_tangent, const void* dy,
                                      const void* dy_tangent, void* dpre_tangent,
                                      std::int64_t numel);
  /// y = x * mask * scale for `rows` rows of `columns`; row_keys [rows, 2].
  void (*dropout)(const Dropout& dropout, DType dtype, const std::int32_t* row_keys,
                  std::int64_t rows, std::int64_t columns, const void* x, void* y);
  /// sums[c] += sum over rows of x[r, c], x [rows, columns].
  void (*column_sums)(DType dtype, const void* x, std::int64_t rows, std::int64_t columns,
                      float* sums);
  /// y = (a + b) + c.
  void (*add_three)(DType dtype, const void* a, const void* b, const void* c, void* y,
                    std::int64_t numel);
  /// destination += x.
  void (*accumulate)(DType dtype, const void* x, float* destination, std::int64_t numel);
};

}  // namespace bitfall
