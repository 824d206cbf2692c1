// Attention on packed sequences: tensor cores (attention_tiles*.cuh) where dtype, head size and
// shared memory allow, a warp per row (attention_rows.cuh) otherwise.
#include <type_traits>

#include "core/checks.h"
#include "core/operation_checks.h"
#include "csrc_cuda/attention_launch.cuh"
#include "csrc_cuda/attention_rows.cuh"
#include "csrc_cuda/attention_tiles_backward.cuh"
#include "csrc_cuda/attention_tiles_forward.cuh"
#include "csrc_cuda/cuda_backend.h"

namespace bitfall {
namespace {

using namespace attention_launch;

Launch tiles_launch(const char* operation, const AttentionProblem& problem, int shared_bytes,
                    cudaStream_t stream) {
  return {operation,
          dim3(static_cast<unsigned>(sequence_parts(problem, attention_tiles::kRows)),
               static_cast<unsigned>(problem.heads)),
          dim3(attention_tiles::kThreads), static_cast<std::size_t>(shared_bytes), stream};
}

template <typename T, int kDepth>
void tiles_forward(const AttentionProblem& problem, const AttentionForward<T>& data,
                   cudaStream_t stream) {
  namespace tiles = attention_tiles;
  run(tiles_launch("attention_forward", problem, tiles::kForwardBytes<T, kDepth>, stream),
      tiles::forward_kernel<T, kDepth>, problem, data);
}

template <typename T, int kDepth>
void tiles_backward(const AttentionProblem& problem, const AttentionBackward<T>& data,
                    cudaStream_t stream) {
  namespace tiles = attention_tiles;
  const Launch launch =
      tiles_launch("attention_backward", problem, tiles::kBackwardBytes<T, kDepth>, stream);
  run(launch, tiles::key_gradient_kernel<T, kDepth>, problem, data);
  run(launch, tiles::query_gradient_kernel<T, kDepth>, problem, data);
}

/// Below this head size, tensor cores would multiply zeros for the most part.
constexpr std::int64_t kSmallestTile = 16;

/// Calls `tiles` with the depth that holds head_size, or `rows` where tensor cores do not fit. A
/// block may have `most_shared_bytes`: not every GPU gives it enough for the greatest depth.
template <typename T, typename Tiles, typename Rows>
void choose(const AttentionProblem& problem, int most_shared_bytes, const Tiles& tiles,
            const Rows& rows) {
  if constexpr (!std::is_same_v<T, float>) {
    if (problem.head_size < kSmallestTile) return rows();
    if (problem.head_size <= 32) return tiles(std::integral_constant<int, 32>{});
    if (problem.head_size <= 64) return tiles(std::integral_constant<int, 64>{});
    if (problem.head_size <= 128 && attention_tiles::kBackwardBytes<T, 128> <= most_shared_bytes)
      return tiles(std::integral_constant<int, 128>{});
  }
  rows();
}

template <typename T>
void forward(const AttentionProblem& problem, int most_shared_bytes,
             const AttentionForward<T>& data, cudaStream_t stream) {
  choose<T>(
      problem, most_shared_bytes,
      [&](auto depth) { tiles_forward<T, decltype(depth)::value>(problem, data, stream); },
      [&] {
        run(rows_launch("attention_forward", problem,
                        attention_rows::WarpMemory<>::floats(problem.head_size), stream),
            attention_rows::forward_kernel<T>, problem, data);
      });
}

template <typename T>
void backward(const AttentionProblem& problem, int most_shared_bytes, const T* out, float* delta,
              const AttentionBackward<T>& data, cudaStream_t stream) {
  namespace rows = attention_rows;
  const Launch per_token = tokens_launch("attention_backward", problem, stream);
  run(per_token, rows::delta_kernel<T>, problem, data.dout, out, delta);
  choose<T>(
      problem, most_shared_bytes,
      [&](auto depth) { tiles_backward<T, decltype(depth)::value>(problem, data, stream); },
      [&] {
        const Launch launch =
            rows_launch("attention_backward", problem,
                        attention_rows::WarpMemory<>::floats(problem.head_size), stream);
        run(launch, rows::query_gradient_kernel<T>, problem, data);
        run(launch, rows::key_gradient_kernel<T>, problem, data);
      });
}

}  // namespace

void CudaBackend::attention_forward(const AttentionShape& shape, const Tensor& qkv,
                                    const Tensor& sequence_starts, const Tensor& sample_keys,
                                    const Dropout& dropout, const Tensor& out,
                                    const Tensor& log_sum_exp) {
  constexpr const char* kName = "attention_forward";
  check_attention(kName, shape, qkv, sequence_starts, sample_keys, dropout, out, log_sum_exp);
  const AttentionProblem problem =
      make_problem(kName, shape, qkv, sequence_starts, sample_keys, dropout);
  if (problem.tokens == 0) return;
  visit_dtype(qkv.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    forward<T>(problem, most_shared_bytes(device_index()),
               {device_data<const T>(qkv), device_data<T>(out), device_data<float>(log_sum_exp)},
               stream());
  });
}

void CudaBackend::attention_backward(const AttentionShape& shape, const Tensor& dout,
                                     const Tensor& qkv, const Tensor& out,
                                     const Tensor& log_sum_exp, const Tensor& sequence_starts,
                                     const Tensor& sample_keys, const Dropout& dropout,
                                     const Tensor& dqkv) {
  constexpr const char* kName = "attention_backward";
  check_attention(kName, shape, qkv, sequence_starts, sample_keys, dropout, out, log_sum_exp);
  check_tensor(kName, "dout", dout, qkv.dtype, out.shape);
  check_tensor(kName, "dqkv", dqkv, qkv.dtype, qkv.shape);
  const AttentionProblem problem =
      make_problem(kName, shape, qkv, sequence_starts, sample_keys, dropout);
  if (problem.tokens == 0) return;
  auto* const delta = static_cast<float*>(scratch(log_sum_exp.bytes()));
  visit_dtype(qkv.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    backward<T>(problem, most_shared_bytes(device_index()), device_data<const T>(out), delta,
                {device_data<const T>(qkv), device_data<const T>(dout),
                 device_data<const float>(log_sum_exp), delta, device_data<T>(dqkv)},
                stream());
  });
}

}  // namespace bitfall
