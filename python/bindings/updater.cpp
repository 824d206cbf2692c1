// bitfall._core.Updater: memory goes out as DLPack capsules, which keep the updater alive.
#include <pybind11/stl.h>

#include "core/error.h"
#include "python/bindings/bindings.h"
#include "python/bindings/dlpack.h"
#include "python/bindings/python_updater.h"
#include "python/bindings/step_result.h"

namespace py = pybind11;

namespace bitfall::python {
namespace {

using Shared = std::shared_ptr<PythonUpdater>;

py::capsule to_capsule(const Tensor& tensor, const Shared& owner) {
  return to_dlpack(tensor, owner->device_index(), owner);
}

py::list to_capsules(const std::vector<Tensor>& tensors, const Shared& owner) {
  py::list list;
  for (const Tensor& tensor : tensors) list.append(to_capsule(tensor, owner));
  return list;
}

py::list working(const Shared& self) {
  const ParameterStore& store = self->updater().store();
  return to_capsules(store.views(store.working()), self);
}

py::list gradients(const Shared& self) {
  return to_capsules(self->updater().gradient_views(), self);
}

/// (index of the parameter, master, gradient) for what this rank owns: whole parameters in their
/// shape, parts of them flat.
py::list owned(const Shared& self) {
  const ParameterStore& store = self->updater().store();
  py::list list;
  for (std::size_t index = 0; index < store.parameters().size(); ++index) {
    const Parameter& parameter = store.parameters()[index];
    const FlatRange range = intersection(parameter.range(), store.owned());
    if (range.numel == 0) continue;
    const bool whole = range == parameter.range();
    const Shape shape = whole ? parameter.shape : Shape{range.numel};
    list.append(py::make_tuple(index, to_capsule(store.master(range).reshaped(shape), self),
                               to_capsule(store.gradient(range).reshaped(shape), self)));
  }
  return list;
}

/// (exp_avg, exp_avg_sq) per parameter; empty where ranks share them or the caller updates.
py::list moments(const Shared& self) {
  Updater& updater = self->updater();
  const ParameterStore& store = updater.store();
  py::list list;
  if (updater.optimizer() == nullptr || store.owned().numel != store.numel()) return list;
  const std::vector<Tensor> first = store.views(updater.optimizer()->exp_avg());
  const std::vector<Tensor> second = store.views(updater.optimizer()->exp_avg_sq());
  for (std::size_t i = 0; i < first.size(); ++i) {
    list.append(py::make_tuple(to_capsule(first[i], self), to_capsule(second[i], self)));
  }
  return list;
}

/// Offsets into the range of each parameter's block, or into the whole where it is in none.
std::vector<std::int64_t> block_offsets(PythonUpdater& self) {
  const ParameterStore& store = self.updater().store();
  std::vector<std::int64_t> offsets;
  for (const Parameter& parameter : store.parameters()) {
    const bool in_block = parameter.block != kNoBlock;
    offsets.push_back(parameter.offset - (in_block ? store.block_range(parameter.block).begin : 0));
  }
  return offsets;
}

Optimizer& adam(PythonUpdater& self) {
  check<UnsupportedError>(self.updater().optimizer() != nullptr,
                          "Updater: the caller updates the masters, there is no Adam here");
  return *self.updater().optimizer();
}

}  // namespace

void bind_updater(py::module_& module) {
  const py::call_guard<py::gil_scoped_release> released;
  const auto of_updater = [](auto member) {
    return [member](PythonUpdater& self) { return (self.updater().*member)(); };
  };
  py::class_<PythonUpdater, Shared> updater(module, "Updater");
  updater
      .def(py::init<const std::vector<PythonSpec>&, const CompletedConfig&, Communicator&,
                    const PythonGroups&, std::vector<std::string>, const PythonDevice&,
                    const py::function&>(),
           py::arg("parameters"), py::arg("config"), py::arg("communicator"), py::arg("groups"),
           py::arg("block_names"), py::arg("device"), py::arg("fill"), py::keep_alive<1, 4>())
      .def("working", &working)
      .def("gradients", &gradients)
      .def("zero_gradient", &PythonUpdater::zero_gradient, py::arg("index"))
      .def("owned", &owned)
      .def("moments", &moments)
      .def("block_offsets", &block_offsets)
      .def_property_readonly("loss",
                             [](const Shared& self) { return to_capsule(self->loss(), self); })
      .def_property_readonly("loss_scale", of_updater(&Updater::loss_scale))
      .def_property_readonly("needs_eigenvalues", of_updater(&Updater::needs_eigenvalues))
      .def_property_readonly("reduces_every_micro_batch",
                             of_updater(&Updater::reduces_every_micro_batch))
      .def_property(
          "optimizer_steps", [](PythonUpdater& self) { return adam(self).steps(); },
          [](PythonUpdater& self, std::int64_t steps) { adam(self).set_steps(steps); })
      .def(
          "start_reduction",
          [](PythonUpdater& self, int block, bool accumulate) {
            self.updater().start_reduction(block, accumulate ? Accumulate::yes : Accumulate::no);
          },
          py::arg("block"), py::arg("accumulate") = false, released)
      .def("step", &PythonUpdater::step, py::arg("groups"), py::arg("make_hessian"),
           py::arg("update_masters"))
      .def("plan", &PythonUpdater::plan);
  bind_common(updater, [](PythonUpdater& self) -> Updater& { return self.updater(); });
  bind_checkpoint(module, updater);
}

}  // namespace bitfall::python
