// bitfall._core: the C++ engine for Python. python/bitfall/_core.pyi is its description.
#include "engine/factory.h"
#include "python/bindings/bindings.h"

PYBIND11_MODULE(_core, module) {
  using namespace bitfall::python;
  module.attr("__version__") = BITFALL_VERSION;
  bind_errors(module);
  bind_config(module);
  bind_schedule(module);
  bind_quantize(module);
  bind_communicator(module);
  bind_engine(module);
  bind_native_encoder(module);
  bind_updater(module);
  module.def("cpu_isa", &bitfall::cpu_isa);
  module.def("gpu_index", &bitfall::gpu_index);
  module.def("choose_device", [](const std::string& wanted) {
    const bitfall::DeviceChoice choice = bitfall::choose_device(wanted);
    return pybind11::make_tuple(choice.device, choice.reason);
  });
}
