// Engine: training, evaluation, checkpoints and saved models of one BERT.
#include "engine/engine.h"

#include <pybind11/stl.h>

#include "engine/factory.h"
#include "engine/model_files.h"
#include "engine/quantized_file.h"
#include "python/bindings/arrays.h"
#include "python/bindings/batch.h"
#include "python/bindings/bindings.h"
#include "python/bindings/step_result.h"

namespace py = pybind11;

namespace bitfall::python {
namespace {

/// An engine with what is needed to save its model as a folder.
class PythonEngine {
 public:
  PythonEngine(const std::string& model_dir, const std::string& head, std::int64_t num_labels,
               const CompletedConfig& config, Communicator& communicator, const std::string& device)
      : communicator_(communicator), head_{parse_head_type(head), num_labels} {
    const py::gil_scoped_release release;
    model_config_ = model_config_with_head(read_model_config(model_dir), head_, {});
    engine_ = make_engine(model_dir, head_, config, communicator, device);
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
    return to_dict(result, updater().bit_states());
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

  void prepare_evaluation() { engine_->prepare_evaluation(); }

  void save_model(const std::string& directory, const std::string& weights) {
    check<ConfigError>(weights == "master" || weights == "quantized" || weights == "integers",
                       "weights = '", weights, "': expected 'master', 'quantized' or 'integers'");
    check<ConfigError>(weights != "integers" || updater().quantizer() != nullptr,
                       "weights = 'integers': nothing is quantized in this config");
    // Ranks may hold slices of the masters: all of them take part.
    const Tensor flat =
        weights == "quantized" ? updater().evaluation_weights() : updater().master_weights();
    if (communicator_.rank() != 0) return;
    const ParameterStore& store = updater().store();
    if (weights == "integers") {
      save_quantized_file(directory, engine_->backend(), store.parameters(), store.views(flat),
                          *updater().quantizer(), updater().global_step());
      return;
    }
    bitfall::save_model(directory, model_config_, engine_->backend(), store.parameters(),
                        store.views(flat));
  }

 private:
  Communicator& communicator_;
  HeadConfig head_;
  std::string model_config_;
  std::unique_ptr<Engine> engine_;
};

}  // namespace

void bind_engine(py::module_& module) {
  const py::call_guard<py::gil_scoped_release> released;
  py::class_<PythonEngine> engine(module, "Engine");
  engine
      .def(py::init<const std::string&, const std::string&, std::int64_t, const CompletedConfig&,
                    Communicator&, const std::string&>(),
           py::arg("model_dir"), py::arg("head"), py::arg("num_labels"), py::arg("config"),
           py::arg("communicator"), py::arg("device") = "cpu", py::keep_alive<1, 6>())
      .def_property_readonly("num_layers", &PythonEngine::num_layers)
      .def("train_batch", &PythonEngine::train_batch, py::arg("micro_batches"))
      .def("evaluate", &PythonEngine::evaluate, py::arg("batch"))
      .def("prepare_evaluation", &PythonEngine::prepare_evaluation, released)
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
           released);
  bind_common(engine, [](PythonEngine& self) -> Updater& { return self.updater(); });
}

}  // namespace bitfall::python
