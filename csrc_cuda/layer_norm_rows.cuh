// How the rows of LayerNorm are shared out among warps.
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/error.h"

namespace bitfall {

/// Warps of a block that fit with `floats` f32 of shared memory each.
inline int warps_per_block(const char* operation, std::int64_t floats, std::int64_t hidden_size) {
  constexpr std::int64_t kMostWarps = 4;
  constexpr std::int64_t kSharedBytes = 48 * 1024;  // what every GPU gives a block unasked
  const std::int64_t bytes = floats * static_cast<std::int64_t>(sizeof(float));
  check<UnsupportedError>(bytes <= kSharedBytes, operation, " on cuda: hidden_size ", hidden_size,
                          " needs ", bytes, " bytes of shared memory, ", kSharedBytes,
                          " are there: use a smaller model, or the cpu");
  return static_cast<int>(std::min(kMostWarps, kSharedBytes / bytes));
}

/// Rows whose parameter gradients one warp adds up: by the number of rows alone, so that sums are
/// reproducible.
inline std::int64_t rows_per_warp(std::int64_t rows) {
  constexpr std::int64_t kFewest = 4, kMostWarps = 1024;
  return std::max(kFewest, (rows + kMostWarps - 1) / kMostWarps);
}

}  // namespace bitfall
