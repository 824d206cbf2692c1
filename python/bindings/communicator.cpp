// Communicator: bytes between ranks. Every call that waits for other ranks lets Python run on.
#include "core/communicator.h"

#include <cstring>
#include <string_view>

#include "core/error.h"
#include "engine/factory.h"
#include "python/bindings/bindings.h"

namespace py = pybind11;

namespace bitfall::python {
namespace {

std::vector<std::byte> to_vector(const py::bytes& data) {
  const auto text = static_cast<std::string_view>(data);
  std::vector<std::byte> bytes(text.size());
  if (!text.empty()) std::memcpy(bytes.data(), text.data(), text.size());
  return bytes;
}

py::bytes to_bytes(const std::vector<std::byte>& bytes) {
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

py::bytes broadcast(Communicator& communicator, const py::bytes& data, int root) {
  check<CommunicationError>(root >= 0 && root < communicator.world_size(), "broadcast: root ", root,
                            " of ", communicator.world_size(), " ranks");
  std::vector<std::byte> bytes = to_vector(data);
  {
    const py::gil_scoped_release release;
    communicator.broadcast(bytes, root);
  }
  return to_bytes(bytes);
}

py::list all_gather(Communicator& communicator, const py::bytes& data) {
  const std::vector<std::byte> bytes = to_vector(data);
  std::vector<std::vector<std::byte>> gathered;
  {
    const py::gil_scoped_release release;
    gathered = communicator.all_gather(bytes);
  }
  py::list result;
  for (const std::vector<std::byte>& part : gathered) result.append(to_bytes(part));
  return result;
}

}  // namespace

void bind_communicator(py::module_& module) {
  const py::call_guard<py::gil_scoped_release> released;
  py::class_<Communicator>(module, "Communicator")
      .def_property_readonly("rank", &Communicator::rank)
      .def_property_readonly("world_size", &Communicator::world_size)
      .def_property_readonly("local_rank", &Communicator::local_rank)
      .def("broadcast", &broadcast, py::arg("data"), py::arg("root") = 0)
      .def("all_gather", &all_gather, py::arg("data"))
      .def("barrier", &Communicator::barrier, released)
      .def("abort", &Communicator::abort, py::arg("message"), released);
  module.def("make_communicator", &make_communicator);
}

}  // namespace bitfall::python
