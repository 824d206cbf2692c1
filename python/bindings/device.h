// Where Python wants an engine to compute.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <tuple>

#include "engine/factory.h"

namespace bitfall::python {

/// ("cpu" or "cuda", number of the GPU, CUDA stream that operations go to or nothing), as
/// bitfall.bridge.placement gives it.
using PythonDevice = std::tuple<std::string, int, std::optional<std::uintptr_t>>;

inline std::unique_ptr<Backend> make_backend(const PythonDevice& device) {
  const auto& [name, index, stream] = device;
  return bitfall::make_backend(name, index, stream);
}

}  // namespace bitfall::python
