// Numpy arrays in and out. Nothing is converted silently: a wrong dtype, layout or shape is an
// error.
#pragma once

#include <pybind11/numpy.h>

#include <algorithm>
#include <span>
#include <string>
#include <vector>

#include "core/error.h"

namespace bitfall::python {

/// The elements of a C-contiguous array of exactly this element type. Throws ShapeError that says
/// what `name` has and how to convert it.
template <typename T>
std::span<const T> elements(const std::string& name, const pybind11::array& array) {
  namespace py = pybind11;
  const py::dtype expected = py::dtype::of<T>();
  const std::string expected_name = py::str(py::object(expected));
  check<ShapeError>(array.dtype().is(expected) || array.dtype().equal(expected), name,
                    " has dtype ", std::string(py::str(py::object(array.dtype()))), ", expected ",
                    expected_name, ": use .astype(numpy.", expected_name, ")");
  check<ShapeError>((array.flags() & py::array::c_style) != 0, name,
                    " is not C-contiguous: use numpy.ascontiguousarray");
  return {static_cast<const T*>(array.data()), static_cast<std::size_t>(array.size())};
}

/// The same, as a vector of a one-dimensional array.
template <typename T>
std::vector<T> vector_of(const std::string& name, const pybind11::array& array) {
  const std::span<const T> values = elements<T>(name, array);
  check<ShapeError>(array.ndim() == 1, name, " has ", array.ndim(), " dimensions, expected 1");
  return {values.begin(), values.end()};
}

/// A new one-dimensional array.
template <typename T>
pybind11::array_t<T> array_of(std::span<const T> values) {
  pybind11::array_t<T> array(static_cast<pybind11::ssize_t>(values.size()));
  std::copy(values.begin(), values.end(), array.mutable_data());
  return array;
}

}  // namespace bitfall::python
