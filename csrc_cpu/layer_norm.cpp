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

/// Sums of gradients of gamma and beta, [partials, 2, H], that ranges of rows left.
struct PartialSums {
  float* sums;
  std::int64_t partials, hidden_size;
};

void add_partials(const ElementwiseKernels& kernels, const PartialSums& partial, float* dgamma,
                  float* dbeta) {
  const std::int64_t size = partial.hidden_size;
  for (std::int64_t index = 0; index < partial.partials; ++index) {
    const float* sums = partial.sums + index * 2 * size;
    kernels.accumulate(DType::f32, sums, dgamma, size);
    kernels.accumulate(DType::f32, sums + size, dbeta, size);
  }
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
  add_partials(*kernels_.elementwise, {sums, partials, hidden_size}, args.dgamma.as<float>(),
               args.dbeta.as<float>());
}

void CpuBackend::layer_norm_forward_tangent(const LayerNormForwardTangent& args) {
  check_layer_norm(args);
  parallel_rows(args.sum.shape[0], args.sum.shape[1], [&](std::int64_t begin, std::int64_t end) {
    kernels_.layer_norm->forward_tangent(args, begin, end);
  });
}

void CpuBackend::layer_norm_backward_tangent(const LayerNormBackwardTangent& args) {
  check_layer_norm(args);
  const std::int64_t rows = args.sum.shape[0], hidden_size = args.sum.shape[1];
  if (!args.dgamma_tangent) {
    parallel_rows(rows, hidden_size, [&](std::int64_t begin, std::int64_t end) {
      kernels_.layer_norm->backward_tangent(args, begin, end, nullptr, nullptr);
    });
    return;
  }
  const std::int64_t chunk = rows_per_partial(rows);
  const std::int64_t partials = (rows + chunk - 1) / chunk;
  const std::size_t partial_bytes = 2 * static_cast<std::size_t>(hidden_size) * sizeof(float);
  auto* sums = static_cast<float*>(scratch(static_cast<std::size_t>(partials) * partial_bytes));
  parallel_ranges(rows, chunk, [&](std::int64_t begin, std::int64_t end) {
    float* dgamma = sums + begin / chunk * 2 * hidden_size;
    std::memset(dgamma, 0, partial_bytes);
    kernels_.layer_norm->backward_tangent(args, begin, end, dgamma, dgamma + hidden_size);
  });
  fill_zero(args.dgamma_tangent);
  fill_zero(args.dbeta_tangent);
  add_partials(*kernels_.elementwise, {sums, partials, hidden_size},
               args.dgamma_tangent.as<float>(), args.dbeta_tangent.as<float>());
}

}  // namespace bitfall
