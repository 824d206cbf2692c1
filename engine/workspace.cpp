#include "engine/workspace.h"

namespace bitfall {
namespace {

constexpr std::size_t kAlignment = 64;

}  // namespace

Tensor Workspace::take(DType dtype, const Shape& shape) {
  const Tensor tensor{base_ + used_bytes_, dtype, shape, backend_.device()};
  const std::size_t bytes = static_cast<std::size_t>(shape.numel()) * size_in_bytes(dtype);
  used_bytes_ += (bytes + kAlignment - 1) / kAlignment * kAlignment;
  return tensor;
}

std::byte* Workspace::placeholder() {
  alignas(kAlignment) static std::byte address;
  return &address;
}

void Workspace::reserve(std::size_t bytes) {
  if (bytes > buffer_.bytes()) {
    buffer_ = Buffer();  // first give the old memory back
    buffer_ = backend_.allocate(bytes);
  }
  base_ = static_cast<std::byte*>(buffer_.memory().get());
}

}  // namespace bitfall
