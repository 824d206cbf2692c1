// Tensor: a typed view of device memory. Buffer: the owner of such memory.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <memory>
#include <span>
#include <string>

#include "core/dtype.h"

namespace bitfall {

enum class Device { cpu, cuda };

/// Up to eight dimensions, row-major and contiguous. A default Shape has no dimension and one
/// element.
class Shape {
 public:
  static constexpr std::size_t kMaxRank = 8;

  Shape() = default;
  /// Throws ShapeError above eight dimensions.
  Shape(std::initializer_list<std::int64_t> dims);
  explicit Shape(std::span<const std::int64_t> dims);

  std::size_t rank() const { return rank_; }
  std::int64_t operator[](std::size_t axis) const { return dims_[axis]; }
  std::int64_t numel() const;
  bool operator==(const Shape& other) const = default;
  /// "[2, 3]"
  std::string to_string() const;

 private:
  std::array<std::int64_t, kMaxRank> dims_{};
  std::size_t rank_ = 0;
};

/// Non-owning view of `shape.numel()` contiguous elements. A default Tensor is empty: `data ==
/// nullptr`.
struct Tensor {
  void* data = nullptr;
  DType dtype = DType::f32;
  Shape shape;
  Device device = Device::cpu;

  explicit operator bool() const { return data != nullptr; }
  std::int64_t numel() const { return data == nullptr ? 0 : shape.numel(); }
  std::size_t bytes() const { return static_cast<std::size_t>(numel()) * size_in_bytes(dtype); }

  std::uint64_t address() const { return reinterpret_cast<std::uintptr_t>(data); }

  /// Typed pointer; the caller has dispatched on dtype already.
  template <typename T>
  T* as() const {
    return static_cast<T*>(data);
  }

  /// The same memory under another shape of the same size. Throws ShapeError otherwise.
  Tensor reshaped(const Shape& new_shape) const;
  /// Elements [begin, begin + numel) of the flattened tensor as a 1-D view. Throws ShapeError out
  /// of range.
  Tensor flat_slice(std::int64_t begin, std::int64_t numel) const;
  /// Rows [begin, begin + count) of the first axis. Throws ShapeError out of range.
  Tensor rows(std::int64_t begin, std::int64_t count) const;
};

/// Throws ShapeError that names `what`, the seen and the expected shape unless they are equal.
void check_shape(const char* what, const Tensor& tensor, const Shape& expected);

/// Owner of one allocation. Copies share it (DLPack export keeps it alive that way).
class Buffer {
 public:
  Buffer() = default;
  Buffer(std::shared_ptr<void> memory, std::size_t bytes, Device device)
      : memory_(std::move(memory)), bytes_(bytes), device_(device) {}

  std::size_t bytes() const { return bytes_; }
  const std::shared_ptr<void>& memory() const { return memory_; }
  /// View of the whole beginning of the buffer. Throws ShapeError if the buffer is too small.
  Tensor view(DType dtype, const Shape& shape, std::size_t offset_bytes = 0) const;

 private:
  std::shared_ptr<void> memory_;
  std::size_t bytes_ = 0;
  Device device_ = Device::cpu;
};

}  // namespace bitfall
