#include <algorithm>
#include <cstring>

#include "core/operation_checks.h"
#include "csrc_cpu/cpu_backend.h"
#include "csrc_cpu/parallel.h"

namespace bitfall {
namespace {

/// Rows that share one partial sum of dgamma and dbeta: independent of the number of threads, so
/// that the result is too.
std::int64_t rows_per_partial(std::int64_t rows) {
  constexpr std::int64_t kSmallest = 16, kMostPartials = 64;
  return std::max(kSmallest, (rows + kMostPartials - 1) / kMostPartials);
}

}  // namespace

void CpuBackend::layer_norm_forward(const LayerNormForward& args) {
  check_layer_norm(args);
  parallel_rows(args.x.shape[0], args.x.shape[1], [&](std::int64_t begin, std::int64_t end) {
    kernels_.layer_norm->forward(args, begin, end);
  });
}

void CpuBackend::layer_norm_backward(const LayerNormBackward& args) {
  check_layer_norm(args);
  const std::int64_t rows = args.dy.shape[0], hidden_size = args.dy.shape[1];
  const std::int64_t chunk = rows_per_partial(rows);
  const std::int64_t partials = (rows + chunk - 1) / chunk;
  const std::size_t partial_bytes = 2 * static_cast<std::size_t>(hidden_size) * sizeof(float);
  auto* sums = static_cast<float*>(scratch(static_cast<std::size_t>(partials) * partial_bytes));
  parallel_ranges(rows, chunk, [&](std::int64_t begin, std::int64_t end) {
    float* dgamma = sums + begin / chunk * 2 * hidden_size;
    std::memset(dgamma, 0, partial_bytes);
    kernels_.layer_norm->backward(args, begin, end, dgamma, dgamma + hidden_size);
  });
  if (args.accumulate == Accumulate::no) {
    fill_zero(args.dgamma);
    fill_zero(args.dbeta);
  }
  for (std::int64_t partial = 0; partial < partials; ++partial) {
    const float* dgamma = sums + partial * 2 * hidden_size;
    kernels_.elementwise->accumulate(DType::f32, dgamma, args.dgamma.as<float>(), hidden_size);
    kernels_.elementwise->accumulate(DType::f32, dgamma + hidden_size, args.dbeta.as<float>(),
                                     hidden_size);
  }
}

}  // namespace bitfall
