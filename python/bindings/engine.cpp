// Engine: training, evaluation, checkpoints and saved models of one BERT.
#include "engine/engine.h"

#include <pybind11/stl.h>

#include "engine/factory.h"
#include "engine/model_files.h"
#include "engine/quantized_file.h"
#include "python/bindings/arrays.h"
#include "python/bindings/batch.h"
#include "python/bindings/bindings.h"

namespace py = pybind11;

namespace bitfall::python {
namespace {

/// An engine with what is needed to save its model as a folder.
class PythonEngine {
 public:
  PythonEngine(const std::string& model_dir, const std::string& head, std::int64_t num_labels,
               const CompletedConfig& config, Communicator& communicator)
      : communicator_(communicator), head_{parse_head_type(head), num_labels} {
    const py::gil_scoped_release release;
    model_config_ = model_config_with_head(read_model_config(model_dir), head_, {});
    engine_ = make_engine(model_dir, head_, config, communicator);
  }

  Updater& updater() { return engine_->updater(); }
  int num_layers() { return updater().store().num_blocks(); }

  py::dict train_batch(const std::vector<py::dict>& micro_batches) {
    std::vector<Batch> batches;
    for (const py::dict& micro_batch : micro_batches) batches.push_back(to_batch(micro_batch));
    StepResult result;
    {
      const py::gil_scoped_release release;
      result = engine_->train_batch(batches);
    }
    return to_dict(result);
  }

  py::tuple evaluate(const py::dict& dict) {
    const Batch batch = to_batch(dict);
    Evaluation evaluation;
    {
      const py::gil_scoped_release release;
      evaluation = engine_->evaluate(batch);
    }
    const Shape& shape = evaluation.logits_shape;
    py::array logits = array_of<float>(evaluation.logits);
    return py::make_tuple(evaluation.loss,
                          logits.reshape(std::vector<py::ssize_t>{shape[0], shape[1]}));
  }

  void save_model(const std::string& directory, const std::string& weights) {
    check<ConfigError>(weights == "master" || weights == "quantized" || weights == "integers",
                       "weights = '", weights, "': expected 'master', 'quantized' or 'integers'");
    if (communicator_.rank() != 0) return;
    const ParameterStore& store = updater().store();
    if (weights == "integers") {
      check<ConfigError>(updater().quantizer() != nullptr,
                         "weights = 'integers': nothing is quantized in this config");
      save_quantized_file(directory, engine_->backend(), store, *updater().quantizer(),
                          updater().global_step());
      return;
    }
    const Tensor flat = weights == "master" ? store.master() : updater().evaluation_weights();
    bitfall::save_model(directory, model_config_, engine_->backend(), store.parameters(),
                        store.views(flat));
  }

 private:
  py::dict to_dict(const StepResult& result);
  py::list drops(const StepResult& result);

  Communicator& communicator_;
  HeadConfig head_;
  std::string model_config_;
  std::unique_ptr<Engine> engine_;
};

py::list PythonEngine::drops(const StepResult& result) {
  const std::vector<BitStateSpec> states = updater().bit_states();
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

py::dict PythonEngine::to_dict(const StepResult& result) {
  py::dict bits;
  const std::vector<BitStateSpec> states = updater().bit_states();
  for (std::size_t i = 0; i < states.size(); ++i) bits[py::str(states[i].name)] = result.bits[i];
  py::dict dict;
  dict["step"] = result.step;
  dict["loss"] = result.loss;
  dict["grad_norm"] = result.grad_norm;
  dict["learning_rate"] = result.learning_rate;
  dict["loss_scale"] = result.loss_scale;
  dict["skipped"] = result.skipped;
  dict["bits"] = bits;
  dict["drops"] = drops(result);
  dict["eigenvalues"] = eigenvalues(result);
  return dict;
}

py::dict quantized_sizes(PythonEngine& self) {
  py::dict sizes;
  for (const auto& [name, size] : self.updater().quantized_sizes()) {
    py::dict entry;
    entry["numel"] = size.numel;
    entry["bits"] = size.bits;
    entry["bytes_f32"] = size.bytes_f32;
    entry["bytes_quantized"] = size.bytes_quantized;
    sizes[py::str(name)] = entry;
  }
  return sizes;
}

}  // namespace

void bind_engine(py::module_& module) {
  const py::call_guard<py::gil_scoped_release> released;
  const auto of_updater = [](auto member) {
    return [member](PythonEngine& self) { return (self.updater().*member)(); };
  };
  py::class_<PythonEngine>(module, "Engine")
      .def(py::init<const std::string&, const std::string&, std::int64_t, const CompletedConfig&,
                    Communicator&>(),
           py::arg("model_dir"), py::arg("head"), py::arg("num_labels"), py::arg("config"),
           py::arg("communicator"), py::keep_alive<1, 6>())
      .def_property_readonly("num_layers", &PythonEngine::num_layers)
      .def_property_readonly("global_step", of_updater(&Updater::global_step))
      .def_property_readonly("skipped_steps", of_updater(&Updater::skipped_steps))
      .def("train_batch", &PythonEngine::train_batch, py::arg("micro_batches"))
      .def("evaluate", &PythonEngine::evaluate, py::arg("batch"))
      .def(
          "save_checkpoint",
          [](PythonEngine& self, const std::string& directory, const std::string& tag,
             const std::string& client_state) {
            self.updater().save_checkpoint(directory, tag, client_state);
          },
          py::arg("directory"), py::arg("tag"), py::arg("client_state"), released)
      .def(
          "load_checkpoint",
          [](PythonEngine& self, const std::string& directory,
             const std::optional<std::string>& tag) {
            return self.updater().load_checkpoint(directory, tag.value_or(""));
          },
          py::arg("directory"), py::arg("tag") = py::none(), released)
      .def("save_model", &PythonEngine::save_model, py::arg("directory"), py::arg("weights"),
           released)
      .def("quantization_error", of_updater(&Updater::quantization_error))
      .def("quantized_sizes", &quantized_sizes)
      .def("memory_bytes", of_updater(&Updater::memory_bytes))
      .def("timings", of_updater(&Updater::timings));
}

}  // namespace bitfall::python
