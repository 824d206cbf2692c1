#include "core/checks.h"

#include "core/error.h"

namespace bitfall {
namespace {

const char* name(Device device) { return device == Device::cpu ? "cpu" : "cuda"; }

}  // namespace

void check_dtype(const char* operation, const char* what, const Tensor& tensor, DType dtype) {
  check<UnsupportedError>(tensor.dtype == dtype, operation, " on ", name(tensor.device), ": ", what,
                          " is ", name(tensor.dtype), ", expected ", name(dtype));
}

void check_floating(const char* operation, const char* what, const Tensor& tensor) {
  check<UnsupportedError>(
      tensor.dtype == DType::f32 || tensor.dtype == DType::bf16 || tensor.dtype == DType::f16,
      operation, " on ", name(tensor.device), ": ", what, " is ", name(tensor.dtype),
      ", expected f32, bf16 or f16");
}

void check_rank(const char* operation, const char* what, const Tensor& tensor, std::size_t rank) {
  check<ShapeError>(tensor.shape.rank() == rank, operation, ": ", what, " has shape ",
                    tensor.shape.to_string(), ", expected ", rank, " dimensions");
}

void check_tensor(const char* operation, const char* what, const Tensor& tensor, DType dtype,
                  const Shape& shape) {
  check<ShapeError>(
      tensor.shape == shape && (tensor.data != nullptr || shape.numel() == 0), operation, ": ",
      what,
      tensor.data != nullptr ? " has shape " + tensor.shape.to_string() : std::string(" is empty"),
      ", expected ", shape.to_string());
  check_dtype(operation, what, tensor, dtype);
}

void check_vector(const char* operation, const char* what, const Tensor& tensor,
                  std::int64_t numel) {
  check_dtype(operation, what, tensor, DType::f32);
  check<ShapeError>(tensor.numel() == numel, operation, ": ", what, " has ", tensor.numel(),
                    " elements, expected ", numel);
}

}  // namespace bitfall
