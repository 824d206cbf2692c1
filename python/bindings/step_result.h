// What Engine and Updater tell Python in the same way.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <string>

#include "engine/updater.h"

namespace bitfall::python {

/// The dict StepResult of _core.pyi.
pybind11::dict to_dict(const StepResult& result, const std::vector<BitStateSpec>& states);

/// The dicts PlannedState of _core.pyi; `states` parallels `planned`.
pybind11::list to_list(const std::vector<PlannedState>& planned,
                       const std::vector<BitStateSpec>& states);

/// The dict of quantized_sizes() of _core.pyi.
pybind11::dict to_dict(const std::map<std::string, QuantizedSize>& sizes);

/// Adds what both classes of Python have of their Updater, which `updater_of(self)` gives.
template <typename Class, typename UpdaterOf>
void bind_common(Class& bound, UpdaterOf updater_of) {
  namespace py = pybind11;
  using Self = typename Class::type;
  const auto of_updater = [updater_of](auto member) {
    return [updater_of, member](Self& self) { return (updater_of(self).*member)(); };
  };
  bound.def_property_readonly("global_step", of_updater(&Updater::global_step))
      .def_property_readonly("skipped_steps", of_updater(&Updater::skipped_steps))
      .def("quantization_error", of_updater(&Updater::quantization_error))
      .def("quantized_sizes",
           [updater_of](Self& self) { return to_dict(updater_of(self).quantized_sizes()); })
      .def("memory_bytes", of_updater(&Updater::memory_bytes))
      .def("timings", of_updater(&Updater::timings));
}

}  // namespace bitfall::python
