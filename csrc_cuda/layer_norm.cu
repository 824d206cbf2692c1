// LayerNorm with dropouts and residual: a warp per row, one pass over memory forward.
#include "core/operation_checks.h"
#include "csrc_cuda/cuda_backend.h"
#include "csrc_cuda/element.cuh"
#include "csrc_cuda/layer_norm_rows.cuh"
#include "csrc_cuda/reduce.cuh"

namespace bitfall {
namespace {

/// Calls `body(first)` for the eight columns first + 16 i of each item of this lane.
template <typename Body>
__device__ inline void for_own_columns(std::int64_t columns, Body&& body) {
  const std::int64_t items = (columns + 127) / 128 * 16;
  for (std::int64_t item = threadIdx.x; item < items; item += kWarpThreads)
    body(first_column(item));
}

/// Calls `body(i, column)` for the columns of an item that exist.
template <typename Body>
__device__ inline void for_each_column(std::int64_t first, std::int64_t columns, Body&& body) {
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (first + 16 * i < columns) body(i, first + 16 * i);
  }
}

template <typename T>
struct Forward {
  const T *x, *residual, *gamma, *beta;
  const std::int32_t* row_keys;
  Dropout input_dropout, output_dropout;
  float epsilon;
  T *sum, *y;
  float* mean_rstd;
  std::int64_t rows, columns;
};

template <typename T>
__global__ void forward_kernel(Forward<T> args) {
  extern __shared__ float shared_rows[];  // a row of `sum` per warp; lanes touch own columns only
  const std::int64_t row = static_cast<std::int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (row >= args.rows) return;  // the whole warp; nothing below waits for the block
  const std::int64_t columns = args.columns, offset = row * columns;
  float* const kept = shared_rows + threadIdx.y * columns;

  float total = 0.0f;
  for_own_columns(columns, [&](std::int64_t first) {
    Eight values = load_columns(args.x + offset, first, columns);
    const Eight mask = row_multipliers(args.input_dropout, args.row_keys, row, first);
    for_each_column(first, columns, [&](int i, std::int64_t column) {
      float value = values.value[i] * mask.value[i];
      if (args.residual != nullptr) value += widen(args.residual[offset + column]);
      // The statistics are those of the stored value: backward sees nothing else.
      const T stored = narrow<T>(value);
      args.sum[offset + column] = stored;
      kept[column] = widen(stored);
      total += kept[column];
    });
  });
  const float mean = warp_sum(total) / static_cast<float>(columns);

  float squares = 0.0f;
  for_own_columns(columns, [&](std::int64_t first) {
    for_each_column(first, columns, [&](int, std::int64_t column) {
      const float centred = kept[column] - mean;
      squares += centred * centred;
    });
  });
  const float variance = warp_sum(squares) / static_cast<float>(columns);
  const float rstd = 1.0f / sqrtf(variance + args.epsilon);
  if (threadIdx.x == 0) {
    args.mean_rstd[2 * row] = mean;
    args.mean_rstd[2 * row + 1] = rstd;
  }

  for_own_columns(columns, [&](std::int64_t first) {
    const Eight mask = row_multipliers(args.output_dropout, args.row_keys, row, first);
    for_each_column(first, columns, [&](int i, std::int64_t column) {
      const float normalized = (kept[column] - mean) * rstd;
      const float scaled = normalized * widen(args.gamma[column]) + widen(args.beta[column]);
      args.y[offset + column] = narrow<T>(scaled * mask.value[i]);
    });
  });
}

template <typename T>
struct Backward {
  const T *dy, *sum, *gamma;
  const float* mean_rstd;
  const std::int32_t* row_keys;
  Dropout input_dropout, output_dropout;
  T *dresidual, *dx;
  float *dgamma, *dbeta;  ///< [warps, columns]: sums over the rows of each warp
  std::int64_t rows, columns, rows_per_warp, warps;
};

/// First pass over a row: adds to this lane's columns of dgamma and dbeta. Returns the means of
/// g = gamma * dy after the output dropout's mask, and of g * normalized.
template <typename T>
__device__ inline float2 reduce_row(const Backward<T>& args, std::int64_t row, float* dgamma,
                                    float* dbeta) {
  const std::int64_t columns = args.columns, offset = row * columns;
  const float mean = args.mean_rstd[2 * row], rstd = args.mean_rstd[2 * row + 1];
  float total = 0.0f, total_normalized = 0.0f;
  for_own_columns(columns, [&](std::int64_t first) {
    const Eight mask = row_multipliers(args.output_dropout, args.row_keys, row, first);
    for_each_column(first, columns, [&](int i, std::int64_t column) {
      const float gradient = widen(args.dy[offset + column]) * mask.value[i];
      const float normalized = (widen(args.sum[offset + column]) - mean) * rstd;
      dgamma[column] += gradient * normalized;
      dbeta[column] += gradient;
      const float g = gradient * widen(args.gamma[column]);
      total += g;
      total_normalized += g * normalized;
    });
  });
  const float size = static_cast<float>(columns);
  return {warp_sum(total) / size, warp_sum(total_normalized) / size};
}

/// Second pass: dresidual = rstd * (g - mean(g) - normalized * mean(g * normalized)), and dx.
template <typename T>
__device__ inline void gradient_row(const Backward<T>& args, std::int64_t row, float2 means) {
  const std::int64_t columns = args.columns, offset = row * columns;
  const float mean = args.mean_rstd[2 * row], rstd = args.mean_rstd[2 * row + 1];
  for_own_columns(columns, [&](std::int64_t first) {
    const Eight output = row_multipliers(args.output_dropout, args.row_keys, row, first);
    Eight input{};
    if (args.dx != nullptr) input = row_multipliers(args.input_dropout, args.row_keys, row, first);
    for_each_column(first, columns, [&](int i, std::int64_t column) {
      const float g = widen(args.dy[offset + column]) * output.value[i] * widen(args.gamma[column]);
      const float normalized = (widen(args.sum[offset + column]) - mean) * rstd;
      const float gradient = (g - means.x - normalized * means.y) * rstd;
      args.dresidual[offset + column] = narrow<T>(gradient);
      if (args.dx != nullptr) args.dx[offset + column] = narrow<T>(gradient * input.value[i]);
    });
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
  for_own_columns(columns, [&](std::int64_t first) {
    for_each_column(first, columns,
                    [&](int, std::int64_t column) { dgamma[column] = dbeta[column] = 0.0f; });
  });
  const std::int64_t begin = warp * args.rows_per_warp;
  const std::int64_t end =
      begin + args.rows_per_warp < args.rows ? begin + args.rows_per_warp : args.rows;
  for (std::int64_t row = begin; row < end; ++row) {
    const float2 means = reduce_row(args, row, dgamma, dbeta);
    gradient_row(args, row, means);
  }
  for_own_columns(columns, [&](std::int64_t first) {
    for_each_column(first, columns, [&](int, std::int64_t column) {
      args.dgamma[warp * columns + column] = dgamma[column];
      args.dbeta[warp * columns + column] = dbeta[column];
    });
  });
}

template <typename T>
Forward<T> device_arguments(const LayerNormForward& args) {
  return {device_data<const T>(args.x),
          device_data<const T>(args.residual),
          device_data<const T>(args.gamma),
          device_data<const T>(args.beta),
          device_data<const std::int32_t>(args.row_keys),
          args.input_dropout,
          args.output_dropout,
          args.epsilon,
          device_data<T>(args.sum),
          device_data<T>(args.y),
          device_data<float>(args.mean_rstd),
          args.x.shape[0],
          args.x.shape[1]};
}

}  // namespace

void CudaBackend::layer_norm_forward(const LayerNormForward& args) {
  check_layer_norm(args);
  const std::int64_t rows = args.x.shape[0], columns = args.x.shape[1];
  if (args.x.numel() == 0) return;
  const int warps = warps_per_block("layer_norm_forward", columns, columns);
  const auto blocks = static_cast<unsigned>((rows + warps - 1) / warps);
  const std::size_t shared_bytes =
      static_cast<std::size_t>(warps) * static_cast<std::size_t>(columns) * sizeof(float);
  const cudaStream_t stream = this->stream();
  visit_dtype(args.x.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    forward_kernel<T>
        <<<blocks, dim3(kWarpThreads, static_cast<unsigned>(warps)), shared_bytes, stream>>>(
            device_arguments<T>(args));
  });
  check_launch("layer_norm_forward");
}

void CudaBackend::layer_norm_backward(const LayerNormBackward& args) {
  check_layer_norm(args);
  const std::int64_t rows = args.dy.shape[0], columns = args.dy.shape[1];
  if (columns == 0) return;
  const NormGradients partial(rows, columns);
  const std::int64_t numel = partial.numel();
  const std::int64_t floats = 2 * numel + column_sums_work(partial.warps, columns);
  auto* const dgamma = static_cast<float*>(scratch(static_cast<std::size_t>(floats) * 4));
  float* const dbeta = dgamma + numel;
  if (rows > 0) {
    const NormGradients::Launch launch = partial.launch("layer_norm_backward");
    const cudaStream_t stream = this->stream();
    visit_dtype(args.dy.dtype, [&](auto tag) {
      using T = typename decltype(tag)::type;
      const Backward<T> device_args{device_data<const T>(args.dy),
                                    device_data<const T>(args.sum),
                                    device_data<const T>(args.gamma),
                                    device_data<const float>(args.mean_rstd),
                                    device_data<const std::int32_t>(args.row_keys),
                                    args.input_dropout,
                                    args.output_dropout,
                                    device_data<T>(args.dresidual),
                                    device_data<T>(args.dx),
                                    dgamma,
                                    dbeta,
                                    rows,
                                    columns,
                                    rows_per_warp(rows),
                                    partial.warps};
      backward_kernel<T>
          <<<launch.blocks, launch.threads, launch.shared_bytes, stream>>>(device_args);
    });
    check_launch("layer_norm_backward");
  }
  const Shape shape{partial.warps, columns};
  column_sums({dgamma, DType::f32, shape, Device::cuda}, args.dgamma, args.accumulate,
              dbeta + numel);
  column_sums({dbeta, DType::f32, shape, Device::cuda}, args.dbeta, args.accumulate, dbeta + numel);
}

}  // namespace bitfall
