// parse_config and CompletedConfig.
#include "engine/config.h"

#include <pybind11/stl.h>

#include "engine/lr_schedule.h"
#include "python/bindings/bindings.h"

namespace py = pybind11;

namespace bitfall::python {
namespace {

FlagValues flag_values(const py::dict& flags) {
  FlagValues values;
  for (const auto& [key, value] : flags) {
    const auto entry = py::cast<py::dict>(value);
    values[py::cast<std::string>(key)] = {.flag = py::cast<std::string>(entry["flag"]),
                                          .json = py::cast<std::string>(entry["json"]),
                                          .given = py::cast<bool>(entry["given"])};
  }
  return values;
}

/// Read-only attribute of CompletedConfig that lies in its Config.
template <typename Read>
auto of_config(Read read) {
  return [read](const CompletedConfig& completed) { return read(completed.config); };
}

}  // namespace

void bind_config(py::module_& module) {
  py::class_<CompletedConfig>(module, "CompletedConfig")
      .def_readonly("json", &CompletedConfig::json)
      .def_readonly("origins", &CompletedConfig::origins)
      .def_readonly("warnings", &CompletedConfig::warnings)
      .def_property_readonly("compute_dtype",
                             of_config([](const Config& c) { return name(c.compute_dtype); }))
      .def_property_readonly("train_batch_size",
                             of_config([](const Config& c) { return c.train_batch_size; }))
      .def_property_readonly("train_micro_batch_size_per_gpu", of_config([](const Config& c) {
                               return c.train_micro_batch_size_per_gpu;
                             }))
      .def_property_readonly("gradient_accumulation_steps", of_config([](const Config& c) {
                               return c.gradient_accumulation_steps;
                             }))
      .def_property_readonly("steps_per_print",
                             of_config([](const Config& c) { return c.steps_per_print; }))
      .def_property_readonly("seed", of_config([](const Config& c) { return c.seed; }))
      .def_property_readonly("quantize_enabled",
                             of_config([](const Config& c) { return c.quantize.enabled; }))
      .def_property_readonly("eigenvalue_enabled",
                             of_config([](const Config& c) { return c.eigenvalue.enabled; }));
  module.def(
      "parse_config",
      [](const std::string& text, const std::string& source, const py::dict& flags) {
        return parse_config(text, source, flag_values(flags));
      },
      py::arg("text"), py::arg("source"), py::arg("flags"));
  module.def(
      "scheduled_rate",
      [](const CompletedConfig& completed, double base_rate, std::int64_t completed_steps) {
        return LrSchedule(completed.config.scheduler, base_rate).rate(completed_steps);
      },
      py::arg("config"), py::arg("base_rate"), py::arg("completed_steps"));
}

}  // namespace bitfall::python
