// How operations split their work over OpenMP threads.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/tensor.h"

namespace bitfall {

/// Address of element `index` of the flattened tensor.
inline void* element(const Tensor& tensor, std::int64_t index) {
  return static_cast<std::byte*>(tensor.data) +
         index * static_cast<std::int64_t>(size_in_bytes(tensor.dtype));
}

/// Calls `body(begin, end)` for pieces of [0, size) of at most `chunk` elements, in parallel. The
/// pieces do not depend on the number of threads. `body` must not throw.
template <typename Body>
void parallel_ranges(std::int64_t size, std::int64_t chunk, const Body& body) {
  const std::int64_t chunks = (size + chunk - 1) / chunk;
#pragma omp parallel for schedule(static) if (chunks > 1)
  for (std::int64_t index = 0; index < chunks; ++index) {
    const std::int64_t begin = index * chunk;
    body(begin, begin + chunk < size ? begin + chunk : size);
  }
}

/// The same for rows of `columns` elements: pieces of whole rows, about 8192 elements each.
template <typename Body>
void parallel_rows(std::int64_t rows, std::int64_t columns, const Body& body) {
  const std::int64_t chunk = columns > 8192 ? 1 : 8192 / (columns > 0 ? columns : 1);
  parallel_ranges(rows, chunk, body);
}

}  // namespace bitfall
