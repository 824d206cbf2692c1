// Tensors as DLPack capsules: torch, numpy and others compute on the same memory, without a copy.
#pragma once

#include <pybind11/pybind11.h>

#include <memory>

#include "core/tensor.h"

namespace bitfall::python {

/// A capsule "dltensor" over the memory of `tensor` on its device number `device_index`, for
/// torch.from_dlpack(). What imports it keeps `owner` alive; without an owner the memory must
/// outlive all of its use.
///
/// Throws UnsupportedError for a tensor on a device that has no number here.
pybind11::capsule to_dlpack(const Tensor& tensor, int device_index, std::shared_ptr<void> owner);

}  // namespace bitfall::python
