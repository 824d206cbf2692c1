// The parts of the module bitfall._core. Each function adds one area; _core.pyi describes them all.
#pragma once

#include <pybind11/pybind11.h>

namespace bitfall::python {

void bind_errors(pybind11::module_& module);
void bind_config(pybind11::module_& module);
void bind_schedule(pybind11::module_& module);
void bind_quantize(pybind11::module_& module);
void bind_communicator(pybind11::module_& module);
void bind_engine(pybind11::module_& module);
void bind_native_encoder(pybind11::module_& module);
void bind_updater(pybind11::module_& module);

}  // namespace bitfall::python
