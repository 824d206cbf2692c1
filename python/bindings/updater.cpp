// Updater: the engine's step for a model that Python runs forward and backward. Its memory goes out
// as DLPack capsules.
#include "engine/updater.h"

#include <pybind11/stl.h>

#include "core/error.h"
#include "engine/factory.h"
#include "engine/layer_names.h"
#include "python/bindings/bindings.h"
#include "python/bindings/dlpack.h"
#include "python/bindings/step_result.h"

namespace py = pybind11;

namespace bitfall::python {
namespace {

/// (name, shape, block, whether it lies right behind its predecessor)
using PythonSpec = std::tuple<std::string, std::vector<std::int64_t>, int, bool>;

std::vector<ParameterSpec> to_specs(const std::vector<PythonSpec>& entries) {
  std::vector<ParameterSpec> specs;
  for (const auto& [name, shape, block, adjacent] : entries) {
    specs.push_back(
        {name, Shape(shape), block, adjacent ? Placement::adjacent : Placement::aligned});
  }
  return specs;
}

/// Numbers of a group; its parameters, indices into the specs, only where it is made.
ParameterGroup to_group(const py::dict& dict) {
  ParameterGroup group;
  if (dict.contains("parameters")) {
    group.parameters = py::cast<std::vector<std::size_t>>(dict["parameters"]);
  }
  group.learning_rate = py::cast<double>(dict["lr"]);
  group.weight_decay = py::cast<double>(dict["weight_decay"]);
  group.betas = py::cast<std::array<double, 2>>(dict["betas"]);
  group.eps = py::cast<double>(dict["eps"]);
  return group;
}

std::vector<ParameterGroup> to_groups(const std::vector<py::dict>& dicts) {
  std::vector<ParameterGroup> groups;
  for (const py::dict& dict : dicts) groups.push_back(to_group(dict));
  return groups;
}

UpdateRule to_rule(const std::optional<std::vector<py::dict>>& groups) {
  if (!groups) return {UpdateRule::Kind::caller, {}};
  return {UpdateRule::Kind::groups, to_groups(*groups)};
}

/// Products of a Python object with begin_block(block) and multiply(v, product); the capsules are
/// valid during the call.
class PythonHessian final : public HessianSource {
 public:
  explicit PythonHessian(py::object object) : object_(std::move(object)) {}
  PythonHessian(const PythonHessian&) = delete;
  PythonHessian& operator=(const PythonHessian&) = delete;
  ~PythonHessian() override {
    const py::gil_scoped_acquire acquire;
    object_ = py::object();
  }

  void begin_block(int block) override {
    const py::gil_scoped_acquire acquire;
    object_.attr("begin_block")(block);
  }

  void multiply(const Tensor& v, const Tensor& product) override {
    const py::gil_scoped_acquire acquire;
    object_.attr("multiply")(to_dlpack(v, nullptr), to_dlpack(product, nullptr));
  }

 private:
  py::object object_;
};

/// An Updater with its backend. Tensors that Python has taken keep it alive.
class PythonUpdater {
 public:
  PythonUpdater(const std::vector<PythonSpec>& specs, const CompletedConfig& config,
                Communicator& communicator, const std::optional<std::vector<py::dict>>& groups,
                const py::function& fill)
      : backend_(make_backend("cpu")),
        loss_buffer_(backend_->allocate(sizeof(float))),
        updater_(
            *backend_, communicator, config, to_specs(specs),
            [&fill](Backend&, const ParameterStore& store) { fill_masters(store, fill); },
            to_rule(groups)) {}

  Updater& updater() { return updater_; }
  Tensor loss() const { return loss_buffer_.view(DType::f32, Shape{1}); }

  py::dict step(const std::vector<py::dict>& groups, const py::object& make_hessian,
                const py::object& update_masters) {
    if (updater_.optimizer() != nullptr) updater_.optimizer()->set_numbers(to_groups(groups));
    StepResult result;
    {
      const py::gil_scoped_release release;
      result = updater_.step(
          loss(),
          [&make_hessian]() -> std::unique_ptr<HessianSource> {
            const py::gil_scoped_acquire acquire;
            return std::make_unique<PythonHessian>(make_hessian());
          },
          [&update_masters] {
            const py::gil_scoped_acquire acquire;
            update_masters();
          });
    }
    return to_dict(result, updater_.bit_states());
  }

 private:
  static void fill_masters(const ParameterStore& store, const py::function& fill) {
    for (std::size_t index = 0; index < store.parameters().size(); ++index) {
      fill(index, to_dlpack(store.master(index), nullptr));
    }
  }

  std::unique_ptr<Backend> backend_;
  Buffer loss_buffer_;
  Updater updater_;
};

using Shared = std::shared_ptr<PythonUpdater>;

/// One capsule per parameter over a flat buffer of the updater.
py::list capsules(const Shared& self, const std::string& buffer) {
  Updater& updater = self->updater();
  const ParameterStore& store = updater.store();
  py::list list;
  if (buffer == "gradient") {
    for (const Tensor& view : updater.gradient_views()) list.append(to_dlpack(view, self));
    return list;
  }
  Tensor flat;
  if (buffer == "master") flat = store.master();
  if (buffer == "working") flat = store.working();
  if (updater.optimizer() != nullptr) {
    if (buffer == "exp_avg") flat = updater.optimizer()->exp_avg();
    if (buffer == "exp_avg_sq") flat = updater.optimizer()->exp_avg_sq();
  }
  check<UnsupportedError>(static_cast<bool>(flat), "the updater has no buffer '", buffer, "'");
  for (const Tensor& view : store.views(flat)) list.append(to_dlpack(view, self));
  return list;
}

}  // namespace

void bind_updater(py::module_& module) {
  const py::call_guard<py::gil_scoped_release> released;
  py::class_<PythonUpdater, Shared> updater(module, "Updater");
  updater
      .def(py::init<const std::vector<PythonSpec>&, const CompletedConfig&, Communicator&,
                    const std::optional<std::vector<py::dict>>&, const py::function&>(),
           py::arg("parameters"), py::arg("config"), py::arg("communicator"), py::arg("groups"),
           py::arg("fill"), py::keep_alive<1, 4>())
      .def("capsules", &capsules, py::arg("buffer"))
      .def_property_readonly("loss",
                             [](const Shared& self) { return to_dlpack(self->loss(), self); })
      .def_property_readonly("loss_scale",
                             [](PythonUpdater& self) { return self.updater().loss_scale(); })
      .def_property_readonly("needs_eigenvalues",
                             [](PythonUpdater& self) { return self.updater().needs_eigenvalues(); })
      .def_property_readonly(
          "layer_path",
          [](PythonUpdater& self) { return layer_path(self.updater().store().parameters()); })
      .def(
          "start_reduction",
          [](PythonUpdater& self, int block, bool accumulate) {
            self.updater().start_reduction(block, accumulate ? Accumulate::yes : Accumulate::no);
          },
          py::arg("block"), py::arg("accumulate"), released)
      .def_property_readonly(
          "reduces_every_micro_batch",
          [](PythonUpdater& self) { return self.updater().reduces_every_micro_batch(); })
      .def("step", &PythonUpdater::step, py::arg("groups"), py::arg("make_hessian"),
           py::arg("update_masters"));
  bind_common(updater, [](PythonUpdater& self) -> Updater& { return self.updater(); });
}

}  // namespace bitfall::python
