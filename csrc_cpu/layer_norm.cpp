#include <algorithm>
#include <cstring>

#include "csrc_cpu/checks.h"
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

void check_row_keys(const char* operation, const Tensor& row_keys, std::int64_t rows,
                    const Dropout& input_dropout, const Dropout& output_dropout) {
  if (input_dropout.enabled() || output_dropout.enabled())
    check_tensor(operation, "row_keys", row_keys, DType::s32, Shape{rows, 2});
}

void check_arguments(const LayerNormForward& args) {
  constexpr const char* kName = "layer_norm_forward";
  check_rank(kName, "x", args.x, 2);
  check_floating(kName, "x", args.x);
  const DType dtype = args.x.dtype;
  const Shape& shape = args.x.shape;
  const std::int64_t rows = shape[0], hidden_size = shape[1];
  if (args.residual) check_tensor(kName, "residual", args.residual, dtype, shape);
  check_tensor(kName, "gamma", args.gamma, dtype, Shape{hidden_size});
  check_tensor(kName, "beta", args.beta, dtype, Shape{hidden_size});
  check_tensor(kName, "sum", args.sum, dtype, shape);
  check_tensor(kName, "mean_rstd", args.mean_rstd, DType::f32, Shape{rows, 2});
  check_tensor(kName, "y", args.y, dtype, shape);
  check_row_keys(kName, args.row_keys, rows, args.input_dropout, args.output_dropout);
}

void check_arguments(const LayerNormBackward& args) {
  constexpr const char* kName = "layer_norm_backward";
  check_rank(kName, "dy", args.dy, 2);
  check_floating(kName, "dy", args.dy);
  const DType dtype = args.dy.dtype;
  const Shape& shape = args.dy.shape;
  const std::int64_t rows = shape[0], hidden_size = shape[1];
  check_tensor(kName, "sum", args.sum, dtype, shape);
  check_tensor(kName, "mean_rstd", args.mean_rstd, DType::f32, Shape{rows, 2});
  check_tensor(kName, "gamma", args.gamma, dtype, Shape{hidden_size});
  check_tensor(kName, "dresidual", args.dresidual, dtype, shape);
  if (args.dx || args.input_dropout.enabled()) check_tensor(kName, "dx", args.dx, dtype, shape);
  check_tensor(kName, "dgamma", args.dgamma, DType::f32, Shape{hidden_size});
  check_tensor(kName, "dbeta", args.dbeta, DType::f32, Shape{hidden_size});
  check_row_keys(kName, args.row_keys, rows, args.input_dropout, args.output_dropout);
}

}  // namespace

void CpuBackend::layer_norm_forward(const LayerNormForward& args) {
  check_arguments(args);
  parallel_rows(args.x.shape[0], args.x.shape[1], [&](std::int64_t begin, std::int64_t end) {
    kernels_.layer_norm->forward(args, begin, end);
  });
}

void CpuBackend::layer_norm_backward(const LayerNormBackward& args) {
  check_arguments(args);
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
