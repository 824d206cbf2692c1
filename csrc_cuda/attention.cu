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

template <typename T, int kDepth>
void tiles_forward(const AttentionProblem& problem, const AttentionForward<T>& data,
                   cudaStream_t stream) {
  namespace tiles = attention_tiles;
  run({"attention_forward",
       dim3(static_cast<unsigned>(sequence_parts(problem, tiles::kForwardQueries)),
            static_cast<unsigned>(problem.heads)),
       dim3(tiles::kForwardThreads), tiles::kForwardBytes<kDepth>, stream},
      tiles::forward_kernel<T, kDepth>, problem, data);
}

template <typename T, int kDepth>
void tiles_backward(const AttentionProblem& problem, const AttentionBackward<T>& data,
                    cudaStream_t stream) {
  namespace tiles = attention_tiles;
  run({"attention_backward",
       dim3(static_cast<unsigned>(problem.sequences), static_cast<unsigned>(problem.heads)),
       dim3(tiles::kBackwardThreads), tiles::kBackwardBytes<kDepth>, stream},
      tiles::backward_kernel<T, kDepth>, problem, data);
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
    if (problem.head_size <= 128 && attention_tiles::kBackwardBytes<128> <= most_shared_bytes)
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
void backward(const AttentionProblem& problem, int most_shared_bytes,
              const AttentionBackward<T>& data, cudaStream_t stream) {
  namespace rows = attention_rows;
  constexpr const char* kName = "attention_backward";
  choose<T>(
      problem, most_shared_bytes,
      [&](auto depth) { tiles_backward<T, decltype(depth)::value>(problem, data, stream); },
      [&] {
        run(tokens_launch(kName, problem, stream), rows::delta_kernel<T>, problem, data.dout,
            data.out, data.delta);
        const Launch launch = rows_launch(
            kName, problem, attention_rows::WarpMemory<>::floats(problem.head_size), stream);
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
  // delta [T, A] or dq [T, H].
  auto* const work =
      static_cast<float*>(scratch(static_cast<std::size_t>(out.numel()) * sizeof(float)));
  visit_dtype(qkv.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    backward<T>(problem, most_shared_bytes(device_index()),
                {device_data<const T>(qkv), device_data<const T>(dout), device_data<const T>(out),
                 device_data<const float>(log_sum_exp), device_data<T>(dqkv), work, work},
                stream());
  });
}

}  // namespace bitfall
