// C++ exceptions as Python classes, each also an instance of what Python code would expect.
#include <array>
#include <exception>

#include "core/error.h"
#include "python/bindings/bindings.h"

namespace py = pybind11;

namespace bitfall::python {
namespace {

/// Raises `Type` as the Python class of the same name; tried in the order of the list below.
struct ErrorClass {
  bool (*matches)(const Error& error);
  PyObject* type;
};

std::array<ErrorClass, 8> error_classes;

template <typename Type>
bool is(const Error& error) {
  return dynamic_cast<const Type*>(&error) != nullptr;
}

/// Class `name` derived from `bases`, added to the module. Lives as long as the process.
PyObject* add_class(py::module_& module, const char* name, const py::tuple& bases) {
  const std::string qualified = "bitfall._core." + std::string(name);
  PyObject* type = PyErr_NewException(qualified.c_str(), bases.ptr(), nullptr);
  if (type == nullptr) throw py::error_already_set();
  module.attr(name) = py::reinterpret_borrow<py::object>(type);
  return type;
}

PyObject* base_class = nullptr;

void translate(std::exception_ptr pointer) {
  try {
    if (pointer) std::rethrow_exception(pointer);
  } catch (const Error& error) {
    PyObject* type = base_class;
    for (const ErrorClass& candidate : error_classes) {
      if (candidate.matches(error)) type = candidate.type;
    }
    PyErr_SetString(type, error.what());
  }
}

}  // namespace

void bind_errors(py::module_& module) {
  const auto value_error = py::reinterpret_borrow<py::object>(PyExc_ValueError);
  base_class = add_class(module, "Error",
                         py::make_tuple(py::reinterpret_borrow<py::object>(PyExc_RuntimeError)));
  const auto base = py::reinterpret_borrow<py::object>(base_class);
  const py::tuple plain = py::make_tuple(base), value = py::make_tuple(base, value_error);
  error_classes = {{
      {is<ConfigError>, add_class(module, "ConfigError", value)},
      {is<ShapeError>, add_class(module, "ShapeError", value)},
      {is<UnsupportedError>, add_class(module, "UnsupportedError", plain)},
      {is<BackendError>, add_class(module, "BackendError", plain)},
      {is<CommunicationError>, add_class(module, "CommunicationError", plain)},
      {is<ModelFileError>, add_class(module, "ModelFileError", plain)},
      {is<CheckpointError>, add_class(module, "CheckpointError", plain)},
      {is<TrainingError>, add_class(module, "TrainingError", plain)},
  }};
  py::register_exception_translator(translate);
}

}  // namespace bitfall::python
