// The table of bits by step, without training.
#include <pybind11/stl.h>

#include <optional>

#include "core/error.h"
#include "eigen_sched/bit_schedule.h"
#include "engine/config.h"
#include "engine/encoder.h"
#include "engine/factory.h"
#include "python/bindings/bindings.h"
#include "python/bindings/step_result.h"
#include "quantizer/quantizer.h"

namespace py = pybind11;

namespace bitfall::python {
namespace {

constexpr int kMaxLayers = 1000;

/// Blocks that have eigenvalues: they set the tick of clock "deepspeed-0.6".
int eigenvalue_layers(const Config& config, int num_layers) {
  if (!config.eigenvalue.enabled) return 0;
  return config.eigenvalue.layer_num > 0 ? config.eigenvalue.layer_num : num_layers;
}

void check_plan(const Config& config, int num_layers) {
  check<ConfigError>(config.quantize.enabled,
                     "quantization is off in this config: there is no schedule to plan");
  check<ConfigError>(num_layers >= 1 && num_layers <= kMaxLayers, "num_layers = ", num_layers,
                     ": expected 1..", kMaxLayers);
}

/// Names and ranks of the parameters of a BERT with so many layers; sizes do not matter here.
std::vector<Parameter> bert_parameters(int num_layers) {
  const std::unique_ptr<Backend> backend = make_backend("cpu");
  const EncoderConfig config{.num_hidden_layers = num_layers};
  std::vector<Parameter> parameters;
  const Encoder encoder(*backend, config, HeadConfig());  // outlives the range below
  for (const ParameterSpec& spec : encoder.parameters()) {
    parameters.push_back({spec.name, spec.shape, spec.block, 0, spec.shape.numel()});
  }
  return parameters;
}

py::list plan(const CompletedConfig& completed, int num_layers,
              const std::optional<std::vector<double>>& eigenvalues,
              const std::string& layer_name) {
  const Config& config = completed.config;
  check_plan(config, num_layers);
  const std::vector<double> values = eigenvalues.value_or(std::vector<double>());
  check<ShapeError>(!eigenvalues || values.size() == static_cast<std::size_t>(num_layers),
                    "eigenvalues: ", values.size(), " values for ", num_layers, " layers");
  for (const double value : values) {
    check<ConfigError>(value >= 0 && value <= 1, "eigenvalues: ", value, ": expected 0..1");
  }
  const std::vector<BitStateSpec> specs =
      bit_states(config.quantize, bert_parameters(num_layers), layer_name);
  return to_list(plan_bits(config.quantize, specs, eigenvalue_layers(config, num_layers), values),
                 specs);
}

std::int64_t longest_period(const CompletedConfig& completed, int group, int num_layers, int factor,
                            std::int64_t steps) {
  const Config& config = completed.config;
  check_plan(config, num_layers);
  check<ConfigError>(group >= 0 && static_cast<std::size_t>(group) < config.quantize.groups.size(),
                     "group = ", group, ": expected 0..", config.quantize.groups.size() - 1);
  check<ConfigError>(factor >= 1 && factor <= 5, "factor = ", factor, ": expected 1..5");
  check<ConfigError>(steps >= 0, "steps = ", steps, ": expected 0 or more");
  return longest_period_that_reaches(config.quantize, static_cast<std::size_t>(group),
                                     eigenvalue_layers(config, num_layers), factor, steps);
}

}  // namespace

void bind_schedule(py::module_& module) {
  module.def("plan_bits", &plan, py::arg("config"), py::arg("num_layers"), py::arg("eigenvalues"),
             py::arg("layer_name"));
  module.def("longest_period_that_reaches", &longest_period, py::arg("config"), py::arg("group"),
             py::arg("num_layers"), py::arg("factor"), py::arg("steps"));
}

}  // namespace bitfall::python
