// Checks of one tensor, for the beginning of a backend's operations.
#pragma once

#include "core/tensor.h"

namespace bitfall {

/// Throws UnsupportedError that names operation and tensor unless `tensor` has `dtype`.
void check_dtype(const char* operation, const char* what, const Tensor& tensor, DType dtype);

/// Throws UnsupportedError unless `tensor` is f32, bf16 or f16.
void check_floating(const char* operation, const char* what, const Tensor& tensor);

/// Throws ShapeError that names operation and tensor unless `tensor` has `rank` dimensions.
void check_rank(const char* operation, const char* what, const Tensor& tensor, std::size_t rank);

/// Throws ShapeError unless `tensor` has `shape`, UnsupportedError unless it has `dtype`.
void check_tensor(const char* operation, const char* what, const Tensor& tensor, DType dtype,
                  const Shape& shape);

/// Throws UnsupportedError unless `tensor` is f32, ShapeError unless it has `numel` elements.
void check_vector(const char* operation, const char* what, const Tensor& tensor,
                  std::int64_t numel);

}  // namespace bitfall
