// The structs below are the binary interface of DLPack 0.8 (dlpack.h of its repository): what a
// capsule named "dltensor" points to.
#include "python/bindings/dlpack.h"

#include <array>
#include <cstdint>

#include "core/error.h"

namespace py = pybind11;

namespace bitfall::python {
namespace {

struct DLDevice {
  std::int32_t device_type;
  std::int32_t device_id;
};

struct DLDataType {
  std::uint8_t code;
  std::uint8_t bits;
  std::uint16_t lanes;
};

struct DLTensor {
  void* data;
  DLDevice device;
  std::int32_t ndim;
  DLDataType dtype;
  std::int64_t* shape;
  std::int64_t* strides;
  std::uint64_t byte_offset;
};

struct DLManagedTensor {
  DLTensor dl_tensor;
  void* manager_ctx;
  void (*deleter)(DLManagedTensor* self);
};

constexpr const char* kUnused = "dltensor";  // an importer renames it to "used_dltensor"

/// What one capsule owns.
struct Exported {
  DLManagedTensor managed{};
  std::array<std::int64_t, Shape::kMaxRank> shape{}, strides{};
  std::shared_ptr<void> owner;
};

DLDevice dl_device(Device device, int index) {
  switch (device) {
    case Device::cpu:
      return {1, 0};
    case Device::cuda:
      return {2, index};
  }
  throw UnsupportedError("DLPack: unknown device");
}

DLDataType dl_dtype(DType dtype) {
  const auto bits = static_cast<std::uint8_t>(8 * size_in_bytes(dtype));
  switch (dtype) {
    case DType::s32:
    case DType::s8:
      return {0, bits, 1};
    case DType::f32:
    case DType::f16:
      return {2, bits, 1};
    case DType::bf16:
      return {4, bits, 1};
  }
  throw UnsupportedError("DLPack: unknown dtype");
}

void release(DLManagedTensor* managed) { delete static_cast<Exported*>(managed->manager_ctx); }

/// Of a capsule that nobody has imported.
void release_capsule(PyObject* capsule) {
  if (PyCapsule_IsValid(capsule, kUnused) == 0) return;
  release(static_cast<DLManagedTensor*>(PyCapsule_GetPointer(capsule, kUnused)));
}

}  // namespace

py::capsule to_dlpack(const Tensor& tensor, int device_index, std::shared_ptr<void> owner) {
  auto exported = std::make_unique<Exported>();
  exported->owner = std::move(owner);
  const std::size_t rank = tensor.shape.rank();
  std::int64_t stride = 1;
  for (std::size_t axis = rank; axis-- > 0;) {
    exported->shape[axis] = tensor.shape[axis];
    exported->strides[axis] = stride;
    stride *= tensor.shape[axis];
  }
  exported->managed.dl_tensor = {tensor.data,
                                 dl_device(tensor.device, device_index),
                                 static_cast<std::int32_t>(rank),
                                 dl_dtype(tensor.dtype),
                                 exported->shape.data(),
                                 exported->strides.data(),
                                 0};
  exported->managed.manager_ctx = exported.get();
  exported->managed.deleter = release;
  PyObject* capsule = PyCapsule_New(&exported->managed, kUnused, release_capsule);
  if (capsule == nullptr) throw py::error_already_set();
  static_cast<void>(exported.release());
  return py::reinterpret_steal<py::capsule>(capsule);
}

}  // namespace bitfall::python
