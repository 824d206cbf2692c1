// Whether the optimizer updates, and the vector operations over flat f32 buffers.
//
// Compiled without fused multiply-add (see CMakeLists.txt), and every statement is that of
// csrc_cpu/kernels/adam.cpp: axpby gives the CPU's bits.
#include <algorithm>

#include "core/checks.h"
#include "core/operation_checks.h"
#include "csrc_cuda/cuda_backend.h"
#include "csrc_cuda/element.cuh"
#include "csrc_cuda/reduce.cuh"

namespace bitfall {
namespace {

constexpr std::int64_t kMostParts = 1024;  ///< partial sums of a dot product

/// parts[b] = sum of x[i] * y[i] over the elements of block b, in f64.
__global__ void dot_parts_kernel(const float* x, const float* y, std::int64_t numel,
                                 double* parts) {
  __shared__ double shared[kBlockThreads / kWarpThreads];
  double sum = 0;
  for (std::int64_t i = 8 * grid_thread(); i < numel; i += 8 * grid_threads()) {
    const Eight a = load_eight(x, i, 0, numel), b = load_eight(y, i, 0, numel);
#pragma unroll
    for (int j = 0; j < 8; ++j)
      sum += static_cast<double>(a.value[j]) * static_cast<double>(b.value[j]);
  }
  const double total = block_sum(sum, shared);
  if (threadIdx.x == 0) parts[blockIdx.x] = total;
}

/// Sum of the parts, by one block.
__device__ inline double total_of(const double* parts, int count) {
  __shared__ double shared[kBlockThreads / kWarpThreads];
  double sum = 0;
  for (int i = static_cast<int>(threadIdx.x); i < count; i += kBlockThreads) sum += parts[i];
  return block_sum(sum, shared);
}

__global__ void add_parts_kernel(const double* parts, int count, double* total) {
  const double sum = total_of(parts, count);
  if (threadIdx.x == 0) *total = sum;
}

__global__ void decide_kernel(const float* loss, const double* parts, int count,
                              UpdateLimits limits, UpdateDecision* decision) {
  const double squared_norm = total_of(parts, count);
  if (threadIdx.x == 0) *decision = decided_update(*loss, squared_norm, limits);
}

__global__ void axpby_kernel(float alpha, const float* x, float beta, float* y,
                             std::int64_t numel) {
  for (std::int64_t i = 8 * grid_thread(); i < numel; i += 8 * grid_threads()) {
    Eight result = load_eight(x, i, 0, numel);
    if (beta == 0.0f) {
#pragma unroll
      for (int j = 0; j < 8; ++j) result.value[j] = alpha * result.value[j];
    } else {
      const Eight old = load_eight(y, i, 0, numel);
#pragma unroll
      for (int j = 0; j < 8; ++j) result.value[j] = alpha * result.value[j] + beta * old.value[j];
    }
    store_eight(y, i, 0, numel, result);
  }
}

/// Elements that one block updates, counted from a multiple of eight.
constexpr std::int64_t kBlockElements = 8 * kBlockThreads;

}  // namespace

double CudaBackend::squared_sum(const Tensor& x) { return dot(x, x); }

void CudaBackend::decide_update(const Tensor& loss, const Tensor& gradient,
                                const UpdateLimits& limits, const Tensor& decision) {
  enqueue_decision(loss, enqueue_dot(gradient, gradient), limits, decision);
}

void CudaBackend::decide_update(const Tensor& loss, double squared_norm, const UpdateLimits& limits,
                                const Tensor& decision) {
  auto* const given = static_cast<double*>(scratch(sizeof(double)));
  staging_.copy(&squared_norm, given, sizeof(double), stream());
  enqueue_decision(loss, {given, 1}, limits, decision);
}

void CudaBackend::enqueue_decision(const Tensor& loss, const DotParts& squared_norm,
                                   const UpdateLimits& limits, const Tensor& decision) {
  check_decide_update(loss, decision);
  const cudaStream_t stream = this->stream();
  auto* const decided = device_data<UpdateDecision>(decision);
  decide_kernel<<<1, kBlockThreads, 0, stream>>>(device_data<const float>(loss), squared_norm.sums,
                                                 squared_norm.count, limits, decided);
  check_launch("decide_update");
  cuda_check(cudaMemcpyAsync(&host_numbers_->decision, decided, sizeof(UpdateDecision),
                             cudaMemcpyDeviceToHost, stream),
             "cudaMemcpyAsync");
  cuda_check(cudaEventRecord(decision_read_.get(), stream), "cudaEventRecord");
}

UpdateDecision CudaBackend::last_decision() {
  cuda_check(cudaEventSynchronize(decision_read_.get()), "cudaEventSynchronize");
  return host_numbers_->decision;
}

CudaBackend::DotParts CudaBackend::enqueue_dot(const Tensor& x, const Tensor& y) {
  check_vector("dot", "x", x, x.numel());
  check_vector("dot", "y", y, x.numel());
  const std::int64_t numel = x.numel();
  // The number of parts depends on the size alone, so that the sum is reproducible.
  const std::int64_t parts =
      std::clamp<std::int64_t>((numel + kBlockElements - 1) / kBlockElements, 1, kMostParts);
  auto* const sums = static_cast<double*>(scratch((kMostParts + 1) * sizeof(double)));
  dot_parts_kernel<<<static_cast<unsigned>(parts), kBlockThreads, 0, stream()>>>(
      device_data<const float>(x), device_data<const float>(y), numel, sums);
  check_launch("dot");
  return {sums, static_cast<int>(parts)};
}

double CudaBackend::dot(const Tensor& x, const Tensor& y) {
  const DotParts parts = enqueue_dot(x, y);
  double* const total = parts.sums + kMostParts;
  const cudaStream_t stream = this->stream();
  add_parts_kernel<<<1, kBlockThreads, 0, stream>>>(parts.sums, parts.count, total);
  check_launch("dot");
  cuda_check(
      cudaMemcpyAsync(&host_numbers_->dot, total, sizeof(double), cudaMemcpyDeviceToHost, stream),
      "cudaMemcpyAsync");
  cuda_check(cudaStreamSynchronize(stream), "cudaStreamSynchronize");
  return host_numbers_->dot;
}

void CudaBackend::axpby(float alpha, const Tensor& x, float beta, const Tensor& y) {
  check_vector("axpby", "x", x, x.numel());
  check_vector("axpby", "y", y, x.numel());
  if (x.numel() == 0) return;
  axpby_kernel<<<blocks_for((x.numel() + 7) / 8), kBlockThreads, 0, stream()>>>(
      alpha, device_data<const float>(x), beta, device_data<float>(y), x.numel());
  check_launch("axpby");
}

}  // namespace bitfall
