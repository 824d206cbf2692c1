#include "core/tensor.h"

#include <algorithm>

namespace bitfall {

Shape::Shape(std::initializer_list<std::int64_t> dims)
    : Shape(std::span<const std::int64_t>(dims.begin(), dims.size())) {}

Shape::Shape(std::span<const std::int64_t> dims) : rank_(dims.size()) {
  check<ShapeError>(dims.size() <= kMaxRank, "a tensor has at most ", kMaxRank, " dimensions, got ",
                    dims.size());
  std::copy(dims.begin(), dims.end(), dims_.begin());
}

std::int64_t Shape::numel() const {
  std::int64_t product = 1;
  for (std::size_t axis = 0; axis < rank_; ++axis) product *= dims_[axis];
  return product;
}

std::string Shape::to_string() const {
  std::string text = "[";
  for (std::size_t axis = 0; axis < rank_; ++axis) {
    text += (axis == 0 ? "" : ", ") + std::to_string(dims_[axis]);
  }
  return text + "]";
}

Tensor Tensor::reshaped(const Shape& new_shape) const {
  check<ShapeError>(new_shape.numel() == numel(), "cannot view ", shape.to_string(), " as ",
                    new_shape.to_string());
  return {data, dtype, new_shape, device};
}

Tensor Tensor::flat_slice(std::int64_t begin, std::int64_t count) const {
  check<ShapeError>(begin >= 0 && count >= 0 && begin + count <= numel(), "slice ", begin, "..",
                    begin + count, " is outside of ", numel(), " elements");
  return {as<std::byte>() + begin * static_cast<std::int64_t>(size_in_bytes(dtype)), dtype,
          Shape{count}, device};
}

Tensor Tensor::rows(std::int64_t begin, std::int64_t count) const {
  check<ShapeError>(shape.rank() >= 1 && begin >= 0 && count >= 0 && begin + count <= shape[0],
                    "rows ", begin, "..", begin + count, " are outside of ", shape.to_string());
  const std::int64_t row_elements = shape[0] == 0 ? 0 : numel() / shape[0];
  std::array<std::int64_t, Shape::kMaxRank> dims{count};
  for (std::size_t axis = 1; axis < shape.rank(); ++axis) dims[axis] = shape[axis];
  return {as<std::byte>() + begin * row_elements * static_cast<std::int64_t>(size_in_bytes(dtype)),
          dtype, Shape(std::span<const std::int64_t>(dims.data(), shape.rank())), device};
}

void check_shape(const char* what, const Tensor& tensor, const Shape& expected) {
  check<ShapeError>(tensor.shape == expected, what, " has shape ", tensor.shape.to_string(),
                    ", expected ", expected.to_string());
}

Tensor Buffer::view(DType dtype, const Shape& shape, std::size_t offset_bytes) const {
  const std::size_t needed = static_cast<std::size_t>(shape.numel()) * size_in_bytes(dtype);
  check<ShapeError>(offset_bytes + needed <= bytes_, "a view of ", needed, " bytes at ",
                    offset_bytes, " exceeds the buffer of ", bytes_, " bytes");
  return {static_cast<std::byte*>(memory_.get()) + offset_bytes, dtype, shape, device_};
}

}  // namespace bitfall
