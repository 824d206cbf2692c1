// Tangents of attention on packed sequences, for any dtype and head size.
#include "core/operation_checks.h"
#include "csrc_cuda/attention_launch.cuh"
#include "csrc_cuda/attention_tangent_rows.cuh"
#include "csrc_cuda/cuda_backend.h"

namespace bitfall {
namespace {

using namespace attention_launch;
namespace rows = attention_rows;

template <typename T>
rows::Dual<const T*> dual(const Tensor& value, const Tensor& tangent) {
  return {device_data<const T>(value), device_data<const T>(tangent)};
}

/// delta and its tangent [T, A] each.
template <typename T>
void backward(const AttentionProblem& problem, const rows::Dual<const T*>& out,
              const rows::Dual<float*>& delta, const rows::BackwardTangent<T>& data,
              cudaStream_t stream) {
  constexpr const char* kName = "attention_backward_tangent";
  const std::int64_t size = problem.head_size;
  const Launch per_token = tokens_launch(kName, problem, stream);
  run(per_token, rows::delta_kernel<T>, problem, data.dout.value, out.value, delta.value);
  run(per_token, rows::delta_tangent_kernel<T>, problem, data.dout, out, delta.tangent);
  run(rows_launch(kName, problem, rows::QueryMemory::floats(size), stream),
      rows::query_tangent_kernel<T>, problem, data);
  run(rows_launch(kName, problem, rows::KeyMemory::floats(size), stream),
      rows::key_tangent_kernel<T>, problem, data);
}

}  // namespace

void CudaBackend::attention_forward_tangent(const AttentionShape& shape,
                                            const AttentionTangents& tangents,
                                            const Tensor& sequence_starts) {
  constexpr const char* kName = "attention_forward_tangent";
  check_attention_tangents(kName, shape, tangents, sequence_starts);
  const AttentionTangents& t = tangents;
  const AttentionProblem problem = make_problem(kName, shape, t.qkv, sequence_starts, {}, {});
  if (problem.tokens == 0) return;
  const Launch launch =
      rows_launch(kName, problem, rows::ForwardMemory::floats(problem.head_size), stream());
  visit_dtype(t.qkv.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const rows::ForwardTangent<T> data{
        dual<T>(t.qkv, t.qkv_tangent), device_data<const float>(t.log_sum_exp),
        device_data<T>(t.out_tangent), device_data<float>(t.log_sum_exp_tangent)};
    run(launch, rows::forward_tangent_kernel<T>, problem, data);
  });
}

void CudaBackend::attention_backward_tangent(const AttentionShape& shape,
                                             const AttentionTangents& tangents, const Tensor& dout,
                                             const Tensor& dout_tangent,
                                             const Tensor& sequence_starts,
                                             const Tensor& dqkv_tangent) {
  constexpr const char* kName = "attention_backward_tangent";
  check_attention_tangents(kName, shape, tangents, sequence_starts);
  check_attention_backward_tangent(tangents, dout, dout_tangent, dqkv_tangent);
  const AttentionTangents& t = tangents;
  const AttentionProblem problem = make_problem(kName, shape, t.qkv, sequence_starts, {}, {});
  if (problem.tokens == 0) return;
  auto* const delta = static_cast<float*>(scratch(2 * t.log_sum_exp.bytes()));
  float* const delta_tangent = delta + t.log_sum_exp.numel();
  visit_dtype(t.qkv.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    backward<T>(problem, dual<T>(t.out, t.out_tangent), {delta, delta_tangent},
                {dual<T>(t.qkv, t.qkv_tangent),
                 dual<T>(dout, dout_tangent),
                 dual<float>(t.log_sum_exp, t.log_sum_exp_tangent),
                 {delta, delta_tangent},
                 device_data<T>(dqkv_tangent)},
                stream());
  });
}

}  // namespace bitfall
