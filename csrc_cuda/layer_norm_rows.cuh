// How the rows of LayerNorm are shared out among warps.
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/error.h"
#include "csrc_cuda/cuda_backend.h"
#include "csrc_cuda/reduce.cuh"

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

/// Gradients of gamma and beta on their way: each warp of a backward kernel leaves the sums over
/// its rows in a row of [warps, columns] f32, one such matrix for gamma and one for beta.
struct NormGradients {
  std::int64_t rows, columns, warps;

  NormGradients(std::int64_t rows, std::int64_t columns)
      : rows(rows),
        columns(columns),
        warps((rows + rows_per_warp(rows) - 1) / rows_per_warp(rows)) {}

  std::int64_t numel() const { return warps * columns; }

  struct Launch {
    unsigned blocks;
    dim3 threads;
    std::size_t shared_bytes;
  };
  Launch launch(const char* operation) const {
    const int per_block = warps_per_block(operation, 2 * columns, columns);
    return {static_cast<unsigned>((warps + per_block - 1) / per_block),
            dim3(kWarpThreads, static_cast<unsigned>(per_block)),
            2 * static_cast<std::size_t>(per_block) * static_cast<std::size_t>(columns) *
                sizeof(float)};
  }
};

}  // namespace bitfall
