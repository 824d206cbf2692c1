// Losses. Logits are few (classes per sequence, or two per token): a warp per softmax in f64.
//
// Labels lie on the GPU, and reading them on the host would wait for it: the caller has checked
// them. One that is out of range reads nothing and makes loss or gradient NaN.
#include <cmath>

#include "core/checks.h"
#include "core/operation_checks.h"
#include "csrc_cuda/cuda_backend.h"
#include "csrc_cuda/element.cuh"
#include "csrc_cuda/reduce.cuh"

namespace bitfall {
namespace {

constexpr int kLossThreads = 1024;

/// One softmax: `count` logits at first, first + stride, ...; the target counts in strides.
struct SoftmaxTerm {
  std::int64_t first, stride, count, target;

  __device__ bool valid() const { return target >= 0 && target < count; }
};

/// Row r of logits [R, C] with its label; tangents have no use for one: labels is null.
struct ClassTerms {
  const std::int32_t* labels;
  std::int64_t classes, count;

  __device__ SoftmaxTerm operator()(std::int64_t row) const {
    return {row * classes, 1, classes, labels == nullptr ? 0 : labels[row]};
  }
};

/// Start (even terms) and end (odd terms) of the span in each sequence; positions may be null, too.
struct SpanTerms {
  const std::int32_t *starts, *positions;
  std::int64_t tokens, count;

  __device__ SoftmaxTerm operator()(std::int64_t term) const {
    const std::int64_t begin = starts[term / 2], end = starts[term / 2 + 1];
    if (begin < 0 || end > tokens) return {0, 0, 0, 0};
    return {2 * begin + term % 2, 2, end - begin, positions == nullptr ? 0 : positions[term]};
  }
};

/// log of the softmax denominator, in every lane. All lanes of the warp must call it.
template <typename T>
__device__ double log_denominator(const T* logits, const SoftmaxTerm& term) {
  const int lane = static_cast<int>(threadIdx.x % kWarpThreads);
  double largest = -INFINITY;
  for (std::int64_t i = lane; i < term.count; i += kWarpThreads)
    largest = fmax(largest, static_cast<double>(widen(logits[term.first + i * term.stride])));
  largest = warp_max(largest);
  double sum = 0;
  for (std::int64_t i = lane; i < term.count; i += kWarpThreads)
    sum += exp(static_cast<double>(widen(logits[term.first + i * term.stride])) - largest);
  return largest + log(warp_sum(sum));
}

/// loss = mean over the terms, by one block; warp w takes terms w, w + 32, ...
template <typename T, typename Terms>
__global__ void __launch_bounds__(kLossThreads)
    cross_entropy_kernel(const T* logits, Terms terms, float* loss) {
  __shared__ double shared[kLossThreads / kWarpThreads];
  double sum = 0;
  for (std::int64_t i = threadIdx.x / kWarpThreads; i < terms.count;
       i += kLossThreads / kWarpThreads) {
    const SoftmaxTerm term = terms(i);
    const double denominator = log_denominator(logits, term);
    if (threadIdx.x % kWarpThreads != 0) continue;
    sum += term.valid()
               ? denominator -
                     static_cast<double>(widen(logits[term.first + term.target * term.stride]))
               : static_cast<double>(NAN);
  }
  const double total = block_sum(sum, shared);
  if (threadIdx.x == 0) *loss = static_cast<float>(total / static_cast<double>(terms.count));
}

/// dlogits of every term, a warp each; scale = scale of the loss / number of terms.
template <typename T, typename Terms>
__global__ void cross_entropy_gradient_kernel(const T* logits, Terms terms, double scale,
                                              T* dlogits) {
  const std::int64_t index = grid_thread() / kWarpThreads;
  if (index >= terms.count) return;  // the whole warp
  const SoftmaxTerm term = terms(index);
  const double denominator =
      term.valid() ? log_denominator(logits, term) : static_cast<double>(NAN);
  for (std::int64_t i = threadIdx.x % kWarpThreads; i < term.count; i += kWarpThreads) {
    const std::int64_t at = term.first + i * term.stride;
    const double probability = exp(static_cast<double>(widen(logits[at])) - denominator);
    const double target = i == term.target ? 1.0 : 0.0;
    dlogits[at] = narrow<T>(static_cast<float>(scale * (probability - target)));
  }
}

/// dlogits_tangent = scale * (diag(p) - p p^T) logits_tangent of every term, a warp each.
template <typename T, typename Terms>
__global__ void cross_entropy_tangent_kernel(const T* logits, const T* logits_tangent, Terms terms,
                                             double scale, T* dlogits_tangent) {
  const std::int64_t index = grid_thread() / kWarpThreads;
  if (index >= terms.count) return;  // the whole warp
  const SoftmaxTerm term = terms(index);
  const double denominator = log_denominator(logits, term);
  const auto for_own_logits = [&](auto&& body) {
    for (std::int64_t i = threadIdx.x % kWarpThreads; i < term.count; i += kWarpThreads) {
      const std::int64_t at = term.first + i * term.stride;
      const double probability = exp(static_cast<double>(widen(logits[at])) - denominator);
      body(at, probability, static_cast<double>(widen(logits_tangent[at])));
    }
  };
  double mean = 0;
  for_own_logits(
      [&](std::int64_t, double probability, double tangent) { mean += probability * tangent; });
  mean = warp_sum(mean);
  for_own_logits([&](std::int64_t at, double probability, double tangent) {
    dlogits_tangent[at] = narrow<T>(static_cast<float>(scale * probability * (tangent - mean)));
  });
}

template <typename T>
__global__ void __launch_bounds__(kLossThreads)
    squared_error_kernel(const T* predictions, const float* labels, std::int64_t rows,
                         float* loss) {
  __shared__ double shared[kLossThreads / kWarpThreads];
  double sum = 0;
  for (std::int64_t row = threadIdx.x; row < rows; row += kLossThreads) {
    const double difference = static_cast<double>(widen(predictions[row])) - labels[row];
    sum += difference * difference;
  }
  const double total = block_sum(sum, shared);
  if (threadIdx.x == 0) *loss = static_cast<float>(total / static_cast<double>(rows));
}

template <typename T>
__global__ void squared_error_gradient_kernel(const T* predictions, const float* labels,
                                              std::int64_t rows, double scale, T* dpredictions) {
  for (std::int64_t row = grid_thread(); row < rows; row += grid_threads()) {
    const double difference = static_cast<double>(widen(predictions[row])) - labels[row];
    dpredictions[row] = narrow<T>(static_cast<float>(scale * difference));
  }
}

template <typename Terms>
void launch_forward(const Tensor& logits, const Terms& terms, const Tensor& loss,
                    cudaStream_t stream) {
  visit_dtype(logits.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    cross_entropy_kernel<T, Terms><<<1, kLossThreads, 0, stream>>>(device_data<const T>(logits),
                                                                   terms, device_data<float>(loss));
  });
  check_launch("cross entropy");
}

/// Blocks that give each term a warp.
template <typename Terms>
unsigned blocks_of(const Terms& terms) {
  return static_cast<unsigned>((terms.count * kWarpThreads + kBlockThreads - 1) / kBlockThreads);
}

template <typename Terms>
void launch_backward(const Tensor& logits, const Terms& terms, float scale, const Tensor& dlogits,
                     cudaStream_t stream) {
  const unsigned blocks = blocks_of(terms);
  visit_dtype(logits.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    cross_entropy_gradient_kernel<T, Terms><<<blocks, kBlockThreads, 0, stream>>>(
        device_data<const T>(logits), terms, scale / static_cast<double>(terms.count),
        device_data<T>(dlogits));
  });
  check_launch("cross entropy gradient");
}

template <typename Terms>
void launch_tangent(const Tensor& logits, const Tensor& logits_tangent, const Terms& terms,
                    float scale, const Tensor& dlogits_tangent, cudaStream_t stream) {
  const unsigned blocks = blocks_of(terms);
  visit_dtype(logits.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    cross_entropy_tangent_kernel<T, Terms><<<blocks, kBlockThreads, 0, stream>>>(
        device_data<const T>(logits), device_data<const T>(logits_tangent), terms,
        scale / static_cast<double>(terms.count), device_data<T>(dlogits_tangent));
  });
  check_launch("cross entropy tangent");
}

ClassTerms class_terms(const Tensor& logits, const Tensor& labels) {
  return {device_data<const std::int32_t>(labels), logits.shape[1], logits.shape[0]};
}

SpanTerms span_terms(const Tensor& logits, const Tensor& starts, const Tensor& positions) {
  return {device_data<const std::int32_t>(starts), device_data<const std::int32_t>(positions),
          logits.shape[0], 2 * (starts.numel() - 1)};
}

}  // namespace

void CudaBackend::cross_entropy_forward(const Tensor& logits, const Tensor& labels,
                                        const Tensor& loss) {
  check_cross_entropy("cross_entropy_forward", logits, labels);
  check_tensor("cross_entropy_forward", "loss", loss, DType::f32, Shape{1});
  launch_forward(logits, class_terms(logits, labels), loss, stream());
}

void CudaBackend::cross_entropy_backward(const Tensor& logits, const Tensor& labels, float scale,
                                         const Tensor& dlogits) {
  check_cross_entropy("cross_entropy_backward", logits, labels);
  check_tensor("cross_entropy_backward", "dlogits", dlogits, logits.dtype, logits.shape);
  launch_backward(logits, class_terms(logits, labels), scale, dlogits, stream());
}

void CudaBackend::cross_entropy_backward_tangent(const Tensor& logits, const Tensor& logits_tangent,
                                                 float scale, const Tensor& dlogits_tangent) {
  check_cross_entropy_tangent(logits, logits_tangent, dlogits_tangent);
  launch_tangent(logits, logits_tangent, class_terms(logits, {}), scale, dlogits_tangent, stream());
}

void CudaBackend::mean_squared_error_forward(const Tensor& predictions, const Tensor& labels,
                                             const Tensor& loss) {
  check_squared_error("mean_squared_error_forward", predictions, labels);
  check_tensor("mean_squared_error_forward", "loss", loss, DType::f32, Shape{1});
  const cudaStream_t stream = this->stream();
  visit_dtype(predictions.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    squared_error_kernel<T><<<1, kLossThreads, 0, stream>>>(
        device_data<const T>(predictions), device_data<const float>(labels), predictions.shape[0],
        device_data<float>(loss));
  });
  check_launch("mean_squared_error_forward");
}

void CudaBackend::mean_squared_error_backward(const Tensor& predictions, const Tensor& labels,
                                              float scale, const Tensor& dpredictions) {
  constexpr const char* kName = "mean_squared_error_backward";
  check_squared_error(kName, predictions, labels);
  check_tensor(kName, "dpredictions", dpredictions, predictions.dtype, predictions.shape);
  const std::int64_t rows = predictions.shape[0];
  const cudaStream_t stream = this->stream();
  visit_dtype(predictions.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    squared_error_gradient_kernel<T><<<blocks_for(rows), kBlockThreads, 0, stream>>>(
        device_data<const T>(predictions), device_data<const float>(labels), rows,
        2.0 * scale / static_cast<double>(rows), device_data<T>(dpredictions));
  });
  check_launch(kName);
}

void CudaBackend::span_cross_entropy_forward(const Tensor& logits, const Tensor& sequence_starts,
                                             const Tensor& span_positions, const Tensor& loss) {
  check_span("span_cross_entropy_forward", logits, sequence_starts, span_positions);
  check_tensor("span_cross_entropy_forward", "loss", loss, DType::f32, Shape{1});
  launch_forward(logits, span_terms(logits, sequence_starts, span_positions), loss, stream());
}

void CudaBackend::span_cross_entropy_backward(const Tensor& logits, const Tensor& sequence_starts,
                                              const Tensor& span_positions, float scale,
                                              const Tensor& dlogits) {
  check_span("span_cross_entropy_backward", logits, sequence_starts, span_positions);
  check_tensor("span_cross_entropy_backward", "dlogits", dlogits, logits.dtype, logits.shape);
  launch_backward(logits, span_terms(logits, sequence_starts, span_positions), scale, dlogits,
                  stream());
}

void CudaBackend::span_cross_entropy_backward_tangent(const Tensor& logits,
                                                      const Tensor& logits_tangent,
                                                      const Tensor& sequence_starts, float scale,
                                                      const Tensor& dlogits_tangent) {
  check_span_tangent(logits, logits_tangent, sequence_starts, dlogits_tangent);
  launch_tangent(logits, logits_tangent, span_terms(logits, sequence_starts, {}), scale,
                 dlogits_tangent, stream());
}

}  // namespace bitfall
