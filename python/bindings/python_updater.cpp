#include "python/bindings/python_updater.h"

#include "core/error.h"
#include "engine/factory.h"
#include "engine/layer_names.h"
#include "python/bindings/dlpack.h"
#include "python/bindings/step_result.h"

namespace py = pybind11;

namespace bitfall::python {
namespace {

std::vector<ParameterSpec> to_specs(const std::vector<PythonSpec>& entries) {
  std::vector<ParameterSpec> specs;
  specs.reserve(entries.size());
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
  groups.reserve(dicts.size());
  for (const py::dict& dict : dicts) groups.push_back(to_group(dict));
  return groups;
}

UpdateRule to_rule(const PythonGroups& groups) {
  if (!groups) return {UpdateRule::Kind::caller, {}};
  return {UpdateRule::Kind::groups, to_groups(*groups)};
}

/// Its layers are those of the specs, whatever their names: the caller has compared them.
CompletedConfig with_layers_of(CompletedConfig config, const std::vector<PythonSpec>& specs) {
  std::vector<Parameter> parameters;
  for (const ParameterSpec& spec : to_specs(specs)) {
    parameters.push_back({spec.name, spec.shape, spec.block, 0, spec.shape.numel()});
  }
  config.config.eigenvalue.layer_name = layer_path(parameters);
  config.config.eigenvalue.layer_num = 0;
  return config;
}

/// Products of a Python object with begin_block(block) and multiply(v, product); the capsules are
/// valid during the call.
class PythonHessian final : public HessianSource {
 public:
  PythonHessian(py::object object, int device_index)
      : object_(std::move(object)), device_index_(device_index) {}
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
    object_.attr("multiply")(to_dlpack(v, device_index_, nullptr),
                             to_dlpack(product, device_index_, nullptr));
  }

 private:
  py::object object_;
  int device_index_;
};

void fill_masters(const ParameterStore& store, int device_index, const py::function& fill) {
  for (std::size_t index = 0; index < store.parameters().size(); ++index) {
    fill(index, to_dlpack(store.master(index), device_index, nullptr));
  }
}

}  // namespace

PythonUpdater::PythonUpdater(const std::vector<PythonSpec>& specs, const CompletedConfig& config,
                             Communicator& communicator, const PythonGroups& groups,
                             std::vector<std::string> block_names, const PythonDevice& device,
                             const py::function& fill)
    : backend_(make_backend(device)),
      device_index_(std::get<int>(device)),
      block_names_(std::move(block_names)),
      loss_buffer_(backend_->allocate(sizeof(float))),
      updater_(
          *backend_, connect_devices(*backend_, communicator), with_layers_of(config, specs),
          to_specs(specs),
          [&](Backend&, const ParameterStore& store) { fill_masters(store, device_index_, fill); },
          to_rule(groups)) {
  check<ShapeError>(static_cast<int>(block_names_.size()) == updater_.store().num_blocks(),
                    "Updater: ", block_names_.size(), " names for ", updater_.store().num_blocks(),
                    " blocks");
}

py::dict PythonUpdater::step(const std::vector<py::dict>& groups, const py::object& make_hessian,
                             const py::object& update_masters) {
  if (updater_.optimizer() != nullptr) updater_.optimizer()->set_numbers(to_groups(groups));
  StepResult result;
  {
    const py::gil_scoped_release release;
    result = updater_.step(
        loss(),
        [&]() -> std::unique_ptr<HessianSource> {
          const py::gil_scoped_acquire acquire;
          return std::make_unique<PythonHessian>(make_hessian(), device_index_);
        },
        [&update_masters] {
          const py::gil_scoped_acquire acquire;
          update_masters();
        });
  }
  for (EigenvalueResult& eigenvalue : result.eigenvalues) {
    eigenvalue.name = block_names_[static_cast<std::size_t>(eigenvalue.block)];
  }
  return to_dict(result, states());
}

py::list PythonUpdater::plan() const {
  const Config& config = updater_.config();
  const int blocks = config.eigenvalue.enabled ? updater_.store().num_blocks() : 0;
  const std::vector<BitStateSpec> specs = states();
  const auto planned = [&](double eigenvalue) {
    const std::vector<double> values(static_cast<std::size_t>(blocks), eigenvalue);
    return to_list(plan_bits(config.quantize, specs, blocks, values), specs);
  };
  py::list list = planned(0.0);
  if (blocks == 0) return list;
  for (const py::handle state : planned(1.0)) {
    if (py::cast<int>(state["block"]) >= 0) list.append(state);
  }
  return list;
}

std::vector<BitStateSpec> PythonUpdater::states() const {
  std::vector<BitStateSpec> states = updater_.bit_states();
  const std::string& path = updater_.config().eigenvalue.layer_name;
  for (BitStateSpec& state : states) {
    if (state.block == kNoBlock) continue;
    const std::size_t length = concat(path, ".", state.block).size();
    state.name.replace(state.name.size() - length, length,
                       block_names_[static_cast<std::size_t>(state.block)]);
  }
  return states;
}

}  // namespace bitfall::python
