// Workspace: one growing piece of device memory for everything that lives during a step.
#pragma once

#include "core/backend.h"
#include "core/tensor.h"

namespace bitfall {

class Workspace {
 public:
  explicit Workspace(Backend& backend) : backend_(backend) {}

  /// Runs `layout`, which calls take() for each tensor it needs, twice: once to add up the sizes,
  /// once to place the tensors. Earlier tensors become invalid. Allocates only to grow; throws
  /// BackendError if it cannot.
  template <typename Layout>
  void plan(Layout&& layout) {
    base_ = placeholder();
    used_bytes_ = 0;
    layout();
    reserve(used_bytes_);
    used_bytes_ = 0;
    layout();
  }

  /// The next tensor of the layout, at a multiple of 64 bytes. Its content is undefined, and its
  /// address means nothing while sizes are added up; but it is not empty, so that both runs of a
  /// layout that asks for that take the same.
  Tensor take(DType dtype, const Shape& shape);

  std::size_t bytes() const { return buffer_.bytes(); }

 private:
  /// Never dereferenced.
  static std::byte* placeholder();
  void reserve(std::size_t bytes);

  Backend& backend_;
  Buffer buffer_;
  std::byte* base_ = nullptr;
  std::size_t used_bytes_ = 0;
};

}  // namespace bitfall
