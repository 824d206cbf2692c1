// Checkpoints of bitfall._core.Updater, with the caller's text and tensors in them.
#include <pybind11/stl.h>

#include <optional>

#include "core/error.h"
#include "engine/checkpoint.h"
#include "python/bindings/python_updater.h"

namespace py = pybind11;

namespace bitfall::python {
namespace {

/// name -> (dtype of safetensors, shape, bytes)
using PackedTensors =
    std::map<std::string, std::tuple<std::string, std::vector<std::int64_t>, py::buffer>>;

void save(PythonUpdater& self, const std::string& directory, const std::string& tag,
          const std::string& client_state, const PackedTensors& tensors) {
  std::vector<py::buffer_info> buffers;  // hold the memory until all is written
  std::vector<ClientTensor> client_tensors;
  for (const auto& [name, packed] : tensors) {
    const auto& [dtype, shape, data] = packed;
    buffers.push_back(data.request());
    const auto bytes = static_cast<std::size_t>(buffers.back().size * buffers.back().itemsize);
    client_tensors.push_back(
        {{name, dtype, shape}, {static_cast<const std::byte*>(buffers.back().ptr), bytes}});
  }
  const py::gil_scoped_release release;
  self.updater().save_checkpoint(directory, tag, client_state, client_tensors);
}

void load(PythonUpdater& self, const std::string& directory, const std::string& tag,
          bool with_optimizer) {
  using Options = Updater::LoadOptions;
  const py::gil_scoped_release release;
  self.updater().load_checkpoint(
      directory, tag,
      {with_optimizer ? Options::Optimizer::restore : Options::Optimizer::keep,
       Options::Configs::any});
}

/// (client_state, {name: (dtype, shape, bytes)})
py::tuple read_client(const std::string& directory, const std::optional<std::string>& tag) {
  const ClientCheckpoint checkpoint = read_client_checkpoint(directory, tag.value_or(""));
  py::dict tensors;
  if (!checkpoint.tensors.empty()) {
    const SafetensorsFile file(checkpoint.tensors);
    for (const SafetensorsTensor& tensor : file.tensors()) {
      const py::bytes data(reinterpret_cast<const char*>(tensor.data.data()), tensor.data.size());
      tensors[py::str(tensor.name)] = py::make_tuple(tensor.dtype, tensor.shape, data);
    }
  }
  return py::make_tuple(checkpoint.client_state, tensors);
}

}  // namespace

void bind_checkpoint(py::module_& module,
                     py::class_<PythonUpdater, std::shared_ptr<PythonUpdater>>& updater) {
  updater
      .def("save_checkpoint", &save, py::arg("directory"), py::arg("tag"), py::arg("client_state"),
           py::arg("tensors"))
      .def("load_checkpoint", &load, py::arg("directory"), py::arg("tag"),
           py::arg("with_optimizer"));
  module.def("read_client_checkpoint", &read_client, py::arg("directory"),
             py::arg("tag") = py::none());
}

}  // namespace bitfall::python
