// A micro-batch as Python gives it.
#pragma once

#include <pybind11/pybind11.h>

#include "core/model.h"

namespace bitfall::python {

/// The dict of _core.pyi as a Batch. Throws ShapeError that names the key for one that is missing
/// or unknown, and for arrays of a wrong dtype, layout or shape. Values are checked by the model.
Batch to_batch(const pybind11::dict& dict);

}  // namespace bitfall::python
