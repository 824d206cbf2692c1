// LayerNorm with dropouts and residual: a row stays in registers, one pass over memory.
#include "core/operation_checks.h"
#include "csrc_cuda/cuda_backend.h"
#include "csrc_cuda/layer_norm_rows.cuh"

namespace bitfall {
namespace {

// Where a warp takes a row, a block takes few of them, and as many blocks must find registers on a
// multiprocessor as keep its memory busy: 12 to 16 warps. Other rows may take a larger block.
constexpr int kForwardRows = 4, kForwardThreads = 384, kBackwardThreads = 256;
constexpr int backward_rows(int groups) { return groups < kMostGroups ? 8 : 4; }

constexpr int forward_threads(RowKind kind) {
  return kind == RowKind::warp ? kForwardRows * kWarpThreads : kForwardThreads;
}
constexpr int forward_blocks(RowKind kind) { return kind == RowKind::warp ? 4 : 1; }
constexpr int backward_threads(RowKind kind, int groups) {
  return kind == RowKind::warp ? backward_rows(groups) * kWarpThreads : kBackwardThreads;
}
template <typename T>
constexpr int backward_blocks(RowKind kind, int groups) {
  if (kind != RowKind::warp || sizeof(T) > 2) return 1;
  return groups < kMostGroups ? 2 : 3;
}

constexpr unsigned kAllKept = 0xffffffffu;

template <typename T>
struct Forward {
  const T *x, *residual, *gamma, *beta;
  const std::int32_t* row_keys;  ///< null if no dropout is on
  DropoutMask input_dropout, output_dropout;
  float epsilon;
  T *sum, *y;  ///< sum: null if x is that already
  float* mean_rstd;
  std::int64_t rows;
  int columns;
};

/// Stores dropout(values) + residual, and leaves it in `values` as stored: the statistics are those
/// of what the backward pass sees.
template <typename T, int kGroups, RowKind kKind>
__device__ inline void add_residual(const Forward<T>& args,
                                    const OwnColumns<T, kGroups, kKind>& own, std::int64_t offset,
                                    const RowKey& key, const Packed<T> (&residual)[kGroups],
                                    Packed<T> (&values)[kGroups]) {
  unsigned kept = kAllKept;
  if (args.input_dropout.enabled()) kept = own.kept(args.input_dropout, key);
  const float scale = args.input_dropout.scale;
#pragma unroll
  for (int group = 0; group < kGroups; ++group) {
    Eight sum;
#pragma unroll
    for (int i = 0; i < 8; ++i)
      sum.value[i] =
          values[group][i] * (is_kept(kept, group, i) ? scale : 0.0f) + residual[group][i];
    values[group] = packed<T>(sum);
  }
  own.store(args.sum + offset, values);
}

/// {mean, 1 / deviation} of a row.
template <typename T, int kGroups, RowKind kKind>
__device__ inline float2 statistics(const OwnColumns<T, kGroups, kKind>& own,
                                    const Packed<T> (&values)[kGroups], float epsilon) {
  const auto size = static_cast<float>(own.columns);
  float total = 0.0f, squares = 0.0f;
  for_each<kGroups>([&](int group, int i) { total += values[group][i]; });
  const float mean = own.sum(total) / size;
  for_each<kGroups>([&](int group, int i) {
    const float centred = own.has(group, i) ? values[group][i] - mean : 0.0f;
    squares += centred * centred;
  });
  return {mean, 1.0f / sqrtf(own.sum(squares) / size + epsilon)};
}

template <typename T, int kGroups, RowKind kKind>
__global__ void __launch_bounds__(forward_threads(kKind), forward_blocks(kKind))
    forward_kernel(Forward<T> args) {
  const std::int64_t row = static_cast<std::int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (row >= args.rows) return;  // the whole warp, which is all that shares the row
  const OwnColumns<T, kGroups, kKind> own(args.columns);
  const std::int64_t offset = row * args.columns;
  Packed<T> values[kGroups], residual[kGroups] = {}, gamma[kGroups], beta[kGroups];
  own.load(args.x + offset, values);
  if (args.residual != nullptr) own.load(args.residual + offset, residual);
  const RowKey key(args.row_keys, row);  // waited for first, so begun last
  if (args.sum != nullptr) add_residual(args, own, offset, key, residual, values);
  own.load(args.gamma, gamma);
  own.load(args.beta, beta);
  const float2 found = statistics(own, values, args.epsilon);
  if (threadIdx.x == 0) {
    args.mean_rstd[2 * row] = found.x;
    args.mean_rstd[2 * row + 1] = found.y;
  }
  Eight y[kGroups];
  for_each<kGroups>([&](int group, int i) {
    y[group].value[i] = (values[group][i] - found.x) * found.y * gamma[group][i] + beta[group][i];
  });
  if (args.output_dropout.enabled()) {
    const unsigned kept = own.kept(args.output_dropout, key);
    for_each<kGroups>([&](int group, int i) {
      y[group].value[i] *= is_kept(kept, group, i) ? args.output_dropout.scale : 0.0f;
    });
  }
  own.store(args.y + offset, y);
}

template <typename T, int kGroups>
__device__ inline void clear_dropped(unsigned kept, Packed<T> (&values)[kGroups]) {
  for_each<kGroups>([&](int group, int i) {
    if (!is_kept(kept, group, i)) values[group].clear(i);
  });
}

template <typename T>
struct Backward {
  const T *dy, *sum, *gamma;
  const float* mean_rstd;
  const std::int32_t* row_keys;  ///< null if no dropout is on
  DropoutMask input_dropout, output_dropout;
  T *dresidual, *dx;
  float *dgamma, *dbeta;  ///< [blocks, columns]: sums over the rows of each block
  std::int64_t rows, rows_per_block;
  int columns;
};

/// A row, which adds to this thread's columns of dgamma and dbeta. With n = (sum - mean) rstd and
/// g = gamma dy: dresidual = rstd (g - mean(g) - n mean(g n)). What the output dropout keeps of dy
/// is scaled at the end, in dresidual and in the sums over all rows.
template <typename T, int kGroups, RowKind kKind>
__device__ inline void gradient_row(const Backward<T>& args,
                                    const OwnColumns<T, kGroups, kKind>& own, std::int64_t row,
                                    Eight (&dgamma)[kGroups], Eight (&dbeta)[kGroups]) {
  const std::int64_t offset = row * args.columns;
  Packed<T> dy[kGroups], sum[kGroups], gamma[kGroups];
  own.load(args.dy + offset, dy);
  own.load(args.sum + offset, sum);
  const float mean = args.mean_rstd[2 * row], rstd = args.mean_rstd[2 * row + 1];
  const RowKey key(args.row_keys, row);  // waited for first, so begun last
  if (args.output_dropout.enabled()) clear_dropped(own.kept(args.output_dropout, key), dy);
  unsigned kept = kAllKept;
  if (args.input_dropout.enabled()) kept = own.kept(args.input_dropout, key);

  own.load(args.gamma, gamma);
  Eight g[kGroups], n[kGroups];
  float total_g = 0.0f, total_n = 0.0f;
  for_each<kGroups>([&](int group, int i) {
    const float gradient = dy[group][i];
    n[group].value[i] = (sum[group][i] - mean) * rstd;
    dgamma[group].value[i] += gradient * n[group].value[i];
    dbeta[group].value[i] += gradient;
    g[group].value[i] = gradient * gamma[group][i];
    total_g += g[group].value[i];
    total_n += g[group].value[i] * n[group].value[i];
  });
  const float scale = rstd * args.output_dropout.scale;
  const float share = scale / static_cast<float>(args.columns);
  const float mean_g = own.sum(total_g) * share, mean_n = own.sum(total_n) * share;
  for_each<kGroups>([&](int group, int i) {
    g[group].value[i] = g[group].value[i] * scale - (mean_g + n[group].value[i] * mean_n);
  });
  own.store(args.dresidual + offset, g);
  if (args.dx == nullptr) return;
  for_each<kGroups>([&](int group, int i) {
    g[group].value[i] *= is_kept(kept, group, i) ? args.input_dropout.scale : 0.0f;
  });
  own.store(args.dx + offset, g);
}

template <typename T, int kGroups, RowKind kKind>
__global__ void __launch_bounds__(backward_threads(kKind, kGroups),
                                  backward_blocks<T>(kKind, kGroups))
    backward_kernel(Backward<T> args) {
  const OwnColumns<T, kGroups, kKind> own(args.columns);
  constexpr int kRows = backward_rows(kGroups);
  Eight dgamma[kGroups] = {}, dbeta[kGroups] = {};
  const std::int64_t begin = blockIdx.x * args.rows_per_block;
  const std::int64_t left = args.rows - begin;
  const auto count = static_cast<unsigned>(min(args.rows_per_block, left));
  for (unsigned row = threadIdx.y; row < count; row += blockDim.y)
    gradient_row(args, own, begin + row, dgamma, dbeta);
  const std::int64_t offset = static_cast<std::int64_t>(blockIdx.x) * args.columns;
  own.template add_rows<kRows>(dgamma, args.output_dropout.scale, args.dgamma + offset);
  own.template add_rows<kRows>(dbeta, args.output_dropout.scale, args.dbeta + offset);
}

template <typename Args>
const std::int32_t* needed_keys(const Args& args) {
  const bool needed = args.input_dropout.enabled() || args.output_dropout.enabled();
  return needed ? device_data<const std::int32_t>(args.row_keys) : nullptr;
}

template <typename T>
Forward<T> device_arguments(const LayerNormForward& args) {
  const bool is_sum =
      args.sum.data == args.x.data && !args.residual && !args.input_dropout.enabled();
  return {device_data<const T>(args.x),
          device_data<const T>(args.residual),
          device_data<const T>(args.gamma),
          device_data<const T>(args.beta),
          needed_keys(args),
          DropoutMask(args.input_dropout),
          DropoutMask(args.output_dropout),
          args.epsilon,
          is_sum ? nullptr : device_data<T>(args.sum),
          device_data<T>(args.y),
          device_data<float>(args.mean_rstd),
          args.x.shape[0],
          static_cast<int>(args.x.shape[1])};
}

template <typename T>
Backward<T> device_arguments(const LayerNormBackward& args, const RowSums& sums, float* dgamma,
                             float* dbeta) {
  return {device_data<const T>(args.dy),
          device_data<const T>(args.sum),
          device_data<const T>(args.gamma),
          device_data<const float>(args.mean_rstd),
          needed_keys(args),
          DropoutMask(args.input_dropout),
          DropoutMask(args.output_dropout),
          device_data<T>(args.dresidual),
          device_data<T>(args.dx),
          dgamma,
          dbeta,
          args.dy.shape[0],
          sums.rows_per_block,
          static_cast<int>(args.dy.shape[1])};
}

}  // namespace

void CudaBackend::layer_norm_forward(const LayerNormForward& args) {
  check_layer_norm(args);
  if (args.x.numel() == 0) return;
  const std::int64_t rows = args.x.shape[0], columns = args.x.shape[1];
  const RowLayout layout("layer_norm_forward", columns, kForwardThreads,
                         {args.x, args.residual, args.gamma, args.beta, args.sum, args.y});
  const dim3 block = layout.block(kForwardRows);
  const auto blocks = static_cast<unsigned>((rows + block.y - 1) / block.y);
  const cudaStream_t stream = this->stream();
  visit_dtype(args.x.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    layout.visit([&](auto groups, auto kind) {
      constexpr int kGroups = groups;
      constexpr RowKind kKind = kind;
      forward_kernel<T, kGroups, kKind><<<blocks, block, 0, stream>>>(device_arguments<T>(args));
    });
  });
  check_launch("layer_norm_forward");
}

void CudaBackend::layer_norm_backward(const LayerNormBackward& args) {
  check_layer_norm(args);
  const std::int64_t rows = args.dy.shape[0], columns = args.dy.shape[1];
  if (columns == 0) return;
  const RowLayout layout("layer_norm_backward", columns, kBackwardThreads,
                         {args.dy, args.sum, args.gamma, args.dresidual, args.dx});
  const dim3 block = layout.block(backward_rows(layout.groups));
  const RowSums sums(rows);
  const std::int64_t numel = sums.blocks * columns;
  const std::int64_t floats = 2 * numel + column_sums_work(sums.blocks, columns);
  auto* const dgamma = static_cast<float*>(scratch(static_cast<std::size_t>(floats) * 4));
  float* const dbeta = dgamma + numel;
  const cudaStream_t stream = this->stream();
  if (rows > 0) {
    visit_dtype(args.dy.dtype, [&](auto tag) {
      using T = typename decltype(tag)::type;
      layout.visit([&](auto groups, auto kind) {
        constexpr int kGroups = groups;
        constexpr RowKind kKind = kind;
        backward_kernel<T, kGroups, kKind>
            <<<static_cast<unsigned>(sums.blocks), block, layout.sum_bytes(block, columns),
               stream>>>(device_arguments<T>(args, sums, dgamma, dbeta));
      });
    });
    check_launch("layer_norm_backward");
  }
  const Shape shape{sums.blocks, columns};
  float* const work = dbeta + numel;
  column_sums({dgamma, DType::f32, shape, Device::cuda}, args.dgamma, args.accumulate, work);
  column_sums({dbeta, DType::f32, shape, Device::cuda}, args.dbeta, args.accumulate, work);
}

}  // namespace bitfall
