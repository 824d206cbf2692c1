#include "python/bindings/step_result.h"

namespace py = pybind11;

namespace bitfall::python {
namespace {

py::list drops(const StepResult& result, const std::vector<BitStateSpec>& states) {
  py::list list;
  for (const BitDrop& drop : result.drops) {
    py::dict entry;
    entry["step"] = drop.step;
    entry["name"] = states[drop.state].name;
    entry["old_bits"] = drop.old_bits;
    entry["new_bits"] = drop.new_bits;
    entry["next_threshold"] = drop.next_threshold;
    entry["factor"] = drop.factor;
    list.append(entry);
  }
  return list;
}

py::list eigenvalues(const StepResult& result) {
  py::list list;
  for (const EigenvalueResult& eigenvalue : result.eigenvalues) {
    py::dict entry;
    entry["name"] = eigenvalue.name;
    entry["block"] = eigenvalue.block;
    entry["iterations"] = eigenvalue.iterations;
    entry["products"] = eigenvalue.products;
    entry["converged"] = eigenvalue.converged;
    entry["value"] = eigenvalue.value;
    entry["normalized"] = eigenvalue.normalized;
    entry["factor"] = eigenvalue.factor;
    list.append(entry);
  }
  return list;
}

}  // namespace

py::dict to_dict(const StepResult& result, const std::vector<BitStateSpec>& states) {
  py::dict bits;
  for (std::size_t i = 0; i < states.size(); ++i) bits[py::str(states[i].name)] = result.bits[i];
  py::dict dict;
  dict["step"] = result.step;
  dict["loss"] = result.loss;
  dict["grad_norm"] = result.grad_norm;
  dict["learning_rate"] = result.learning_rate;
  dict["loss_scale"] = result.loss_scale;
  dict["skipped"] = result.skipped;
  dict["bits"] = bits;
  dict["drops"] = drops(result, states);
  dict["eigenvalues"] = eigenvalues(result);
  return dict;
}

py::list to_list(const std::vector<PlannedState>& planned,
                 const std::vector<BitStateSpec>& states) {
  py::list list;
  for (std::size_t i = 0; i < planned.size(); ++i) {
    py::dict state;
    state["name"] = planned[i].name;
    state["group"] = states[i].group;
    state["block"] = states[i].block;
    state["factor"] = planned[i].factor;
    state["drops"] = planned[i].drops;
    list.append(state);
  }
  return list;
}

py::dict to_dict(const std::map<std::string, QuantizedSize>& sizes) {
  py::dict dict;
  for (const auto& [name, size] : sizes) {
    py::dict entry;
    entry["numel"] = size.numel;
    entry["bits"] = size.bits;
    entry["bytes_f32"] = size.bytes_f32;
    entry["bytes_quantized"] = size.bytes_quantized;
    dict[py::str(name)] = entry;
  }
  return dict;
}

}  // namespace bitfall::python
