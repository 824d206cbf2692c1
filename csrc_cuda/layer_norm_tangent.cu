// Tangents of LayerNorm: a warp per row. n is what was normalised, (sum - mean) rstd.
#include <algorithm>

#include "core/operation_checks.h"
#include "csrc_cuda/cuda_backend.h"
#include "csrc_cuda/element.cuh"
#include "csrc_cuda/reduce.cuh"

namespace bitfall {
namespace {

/// Warps of a block that fit with `floats` f32 of shared memory each.
int warps_per_block(const char* operation, std::int64_t floats, std::int64_t hidden_size) {
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
std::int64_t rows_per_warp(std::int64_t rows) {
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

/// Calls `body(column)` for the columns of this lane.
template <typename Body>
__device__ inline void for_own_columns(std::int64_t columns, Body&& body) {
  for (std::int64_t column = threadIdx.x; column < columns; column += kWarpThreads) body(column);
}

/// A quantity and its tangent.
struct Dual {
  float value, tangent;
};

/// A row of n and of its tangent.
template <typename T>
struct NormalizedRow {
  const T *sum, *sum_tangent;
  float mean, rstd;
  float mean_tangent;     ///< mean(sum_tangent)
  float mean_correlated;  ///< mean(n sum_tangent) = -rstd_tangent / rstd^2

  /// All lanes of the warp must call it.
  __device__ NormalizedRow(const T* sums, const T* sum_tangents, const float* mean_rstd,
                           std::int64_t row, std::int64_t columns)
      : sum(sums + row * columns),
        sum_tangent(sum_tangents + row * columns),
        mean(mean_rstd[2 * row]),
        rstd(mean_rstd[2 * row + 1]),
        mean_tangent(0.0f),
        mean_correlated(0.0f) {
    float total = 0.0f, correlated = 0.0f;
    for_own_columns(columns, [&](std::int64_t column) {
      const float tangent = widen(sum_tangent[column]);
      total += tangent;
      correlated += tangent * (widen(sum[column]) - mean) * rstd;
    });
    mean_tangent = warp_sum(total) / static_cast<float>(columns);
    mean_correlated = warp_sum(correlated) / static_cast<float>(columns);
  }

  __device__ Dual operator()(std::int64_t column) const {
    const float n = (widen(sum[column]) - mean) * rstd;
    return {n, (widen(sum_tangent[column]) - mean_tangent - n * mean_correlated) * rstd};
  }
};

template <typename T>
struct Forward {
  const T *sum, *sum_tangent, *gamma, *gamma_tangent, *beta_tangent;
  const float* mean_rstd;
  T* y_tangent;
  std::int64_t rows, columns;
};

template <typename T>
__global__ void forward_kernel(Forward<T> args) {
  const std::int64_t row = static_cast<std::int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (row >= args.rows) return;  // the whole warp; nothing below waits for the block
  const NormalizedRow<T> normalized(args.sum, args.sum_tangent, args.mean_rstd, row, args.columns);
  for_own_columns(args.columns, [&](std::int64_t column) {
    const Dual n = normalized(column);
    float tangent = widen(args.gamma[column]) * n.tangent;
    if (args.gamma_tangent != nullptr)
      tangent += n.value * widen(args.gamma_tangent[column]) + widen(args.beta_tangent[column]);
    args.y_tangent[row * args.columns + column] = narrow<T>(tangent);
  });
}

template <typename T>
struct Backward {
  const T *sum, *sum_tangent, *gamma, *gamma_tangent, *dy, *dy_tangent;
  const float* mean_rstd;
  T* dsum_tangent;
  float *dgamma, *dbeta;  ///< [warps, columns]: sums of tangents over the rows of each warp
  std::int64_t rows, columns, rows_per_warp, warps;

  /// g = dy gamma, the gradient of n.
  __device__ Dual gradient(std::int64_t row, std::int64_t column) const {
    const float d = widen(dy[row * columns + column]), factor = widen(gamma[column]);
    float tangent = widen(dy_tangent[row * columns + column]) * factor;
    if (gamma_tangent != nullptr) tangent += d * widen(gamma_tangent[column]);
    return {d * factor, tangent};
  }
};

/// mean(g) and mean(g n) of a row.
struct RowMeans {
  Dual gradient, normalized;
};

/// First pass over a row's gradients; adds to this lane's columns of dgamma and dbeta.
template <typename T>
__device__ inline RowMeans reduce_row(const Backward<T>& args, const NormalizedRow<T>& normalized,
                                      std::int64_t row, float* dgamma, float* dbeta) {
  Dual total{}, total_normalized{};
  for_own_columns(args.columns, [&](std::int64_t column) {
    const Dual n = normalized(column), g = args.gradient(row, column);
    total.value += g.value;
    total.tangent += g.tangent;
    total_normalized.value += g.value * n.value;
    total_normalized.tangent += g.tangent * n.value + g.value * n.tangent;
    const std::int64_t at = row * args.columns + column;
    const float dy_tangent = widen(args.dy_tangent[at]);
    dgamma[column] += dy_tangent * n.value + widen(args.dy[at]) * n.tangent;
    dbeta[column] += dy_tangent;
  });
  const auto size = static_cast<float>(args.columns);
  return {{warp_sum(total.value) / size, warp_sum(total.tangent) / size},
          {warp_sum(total_normalized.value) / size, warp_sum(total_normalized.tangent) / size}};
}

/// Second pass: the tangent of dsum = rstd u, u = g - mean(g) - n mean(g n), by the product rule.
template <typename T>
__device__ inline void gradient_row(const Backward<T>& args, const NormalizedRow<T>& normalized,
                                    std::int64_t row, const RowMeans& means) {
  const float rstd_change = -normalized.rstd * normalized.mean_correlated;  // rstd_tangent / rstd
  for_own_columns(args.columns, [&](std::int64_t column) {
    const Dual n = normalized(column), g = args.gradient(row, column);
    const float u = g.value - means.gradient.value - n.value * means.normalized.value;
    const float u_tangent = g.tangent - means.gradient.tangent -
                            n.tangent * means.normalized.value - n.value * means.normalized.tangent;
    args.dsum_tangent[row * args.columns + column] =
        narrow<T>((u * rstd_change + u_tangent) * normalized.rstd);
  });
}

template <typename T>
__global__ void backward_kernel(Backward<T> args) {
  extern __shared__ float shared_sums[];  // dgamma and dbeta of each warp; lanes touch own columns
  const std::int64_t warp = static_cast<std::int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (warp >= args.warps) return;  // the whole warp; nothing below waits for the block
  const std::int64_t columns = args.columns;
  float* const dgamma = shared_sums + 2 * threadIdx.y * columns;
  float* const dbeta = dgamma + columns;
  for_own_columns(columns, [&](std::int64_t column) { dgamma[column] = dbeta[column] = 0.0f; });
  const std::int64_t begin = warp * args.rows_per_warp;
  const std::int64_t end =
      begin + args.rows_per_warp < args.rows ? begin + args.rows_per_warp : args.rows;
  for (std::int64_t row = begin; row < end; ++row) {
    const NormalizedRow<T> normalized(args.sum, args.sum_tangent, args.mean_rstd, row, columns);
    const RowMeans means = reduce_row(args, normalized, row, dgamma, dbeta);
    gradient_row(args, normalized, row, means);
  }
  for_own_columns(columns, [&](std::int64_t column) {
    args.dgamma[warp * columns + column] = dgamma[column];
    args.dbeta[warp * columns + column] = dbeta[column];
  });
}

template <typename T>
Backward<T> device_arguments(const LayerNormBackwardTangent& args, float* dgamma, float* dbeta,
                             std::int64_t warps) {
  const std::int64_t rows = args.sum.shape[0], columns = args.sum.shape[1];
  return {device_data<const T>(args.sum),
          device_data<const T>(args.sum_tangent),
          device_data<const T>(args.gamma),
          device_data<const T>(args.gamma_tangent),
          device_data<const T>(args.dy),
          device_data<const T>(args.dy_tangent),
          device_data<const float>(args.mean_rstd),
          device_data<T>(args.dsum_tangent),
          dgamma,
          dbeta,
          rows,
          columns,
          rows_per_warp(rows),
          warps};
}

}  // namespace

void CudaBackend::layer_norm_forward_tangent(const LayerNormForwardTangent& args) {
  constexpr unsigned kWarps = 4;
  check_layer_norm(args);
  const std::int64_t rows = args.sum.shape[0], columns = args.sum.shape[1];
  if (args.sum.numel() == 0) return;
  const auto blocks = static_cast<unsigned>((rows + kWarps - 1) / kWarps);
  const cudaStream_t stream = this->stream();
  visit_dtype(args.sum.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const Forward<T> device_args{device_data<const T>(args.sum),
                                 device_data<const T>(args.sum_tangent),
                                 device_data<const T>(args.gamma),
                                 device_data<const T>(args.gamma_tangent),
                                 device_data<const T>(args.beta_tangent),
                                 device_data<const float>(args.mean_rstd),
                                 device_data<T>(args.y_tangent),
                                 rows,
                                 columns};
    forward_kernel<T><<<blocks, dim3(kWarpThreads, kWarps), 0, stream>>>(device_args);
  });
  check_launch("layer_norm_forward_tangent");
}

void CudaBackend::layer_norm_backward_tangent(const LayerNormBackwardTangent& args) {
  check_layer_norm(args);
  const std::int64_t rows = args.sum.shape[0], columns = args.sum.shape[1];
  if (columns == 0) return;
  const NormGradients partial(rows, columns);
  const std::int64_t numel = partial.numel();
  const std::int64_t floats = 2 * numel + column_sums_work(partial.warps, columns);
  auto* const dgamma = static_cast<float*>(scratch(static_cast<std::size_t>(floats) * 4));
  float* const dbeta = dgamma + numel;
  if (rows > 0) {
    const NormGradients::Launch launch = partial.launch("layer_norm_backward_tangent");
    const cudaStream_t stream = this->stream();
    visit_dtype(args.sum.dtype, [&](auto tag) {
      using T = typename decltype(tag)::type;
      backward_kernel<T><<<launch.blocks, launch.threads, launch.shared_bytes, stream>>>(
          device_arguments<T>(args, dgamma, dbeta, partial.warps));
    });
    check_launch("layer_norm_backward_tangent");
  }
  if (!args.dgamma_tangent) return;
  const Shape shape{partial.warps, columns};
  float* const work = dbeta + numel;
  column_sums({dgamma, DType::f32, shape, Device::cuda}, args.dgamma_tangent, Accumulate::no, work);
  column_sums({dbeta, DType::f32, shape, Device::cuda}, args.dbeta_tangent, Accumulate::no, work);
}

}  // namespace bitfall
