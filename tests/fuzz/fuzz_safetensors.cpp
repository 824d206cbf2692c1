// Any bytes are either a safetensors file or a ModelFileError, and accepted tensors lie inside it.
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <span>

#include "core/error.h"
#include "engine/safetensors.h"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const auto file = std::as_bytes(std::span(data, size));
  try {
    for (const bitfall::SafetensorsTensor& tensor :
         bitfall::parse_safetensors(file, "fuzz.safetensors").tensors) {
      const bool inside = tensor.data.data() >= file.data() &&
                          tensor.data.data() + tensor.data.size() <= file.data() + file.size();
      if (!inside) std::abort();
    }
  } catch (const bitfall::ModelFileError&) {
  }
  return 0;
}
