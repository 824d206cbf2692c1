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

/// Gradients of gamma and beta: sums over ranges of rows, [partials, 2, H] f32, and their sum.
class PartialSums {
 public:
  PartialSums(std::int64_t rows, std::int64_t hidden_size)
      : rows_(rows),
        hidden_size_(hidden_size),
        chunk_(rows_per_partial(rows)),
        partials_((rows + chunk_ - 1) / chunk_) {}

  std::size_t bytes() const { return static_cast<std::size_t>(partials_) * bytes_each(); }

  /// Calls kernel(begin, end, dgamma, dbeta), which adds its rows to both, and leaves what all have
  /// added in `dgamma` and `dbeta`, on top of what is there.
  template <typename Kernel>
  void add(void* memory, const ElementwiseKernels& kernels, const Kernel& kernel,
           const Tensor& dgamma, const Tensor& dbeta) const {
    auto* const sums = static_cast<float*>(memory);
    parallel_ranges(rows_, chunk_, [&](std::int64_t begin, std::int64_t end) {
      float* const own = sums + begin / chunk_ * 2 * hidden_size_;
      std::memset(own, 0, bytes_each());
      kernel(begin, end, own, own + hidden_size_);
    });
    for (std::int64_t index = 0; index < partials_; ++index) {
      const float* const part = sums + index * 2 * hidden_size_;
      kernels.accumulate(DType::f32, part, dgamma.as<float>(), hidden_size_);
      kernels.accumulate(DType::f32, part + hidden_size_, dbeta.as<float>(), hidden_size_);
    }
  }

 private:
  std::size_t bytes_each() const {
    return 2 * static_cast<std::size_t>(hidden_size_) * sizeof(float);
  }

  std::int64_t rows_, hidden_size_, chunk_, partials_;
};

}  // namespace

void CpuBackend::layer_norm_forward(const LayerNormForward& args) {
  check_layer_norm(args);
  parallel_rows(args.x.shape[0], args.x.shape[1], [&](std::int64_t begin, std::int64_t end) {
    kernels_.layer_norm->forward(args, begin, end);
  });
}

void CpuBackend::layer_norm_backward(const LayerNormBackward& args) {
  check_layer_norm(args);
  const PartialSums partials(args.dy.shape[0], args.dy.shape[1]);
  if (args.accumulate == Accumulate::no) {
    fill_zero(args.dgamma);
    fill_zero(args.dbeta);
  }
  partials.add(
      scratch(partials.bytes()), *kernels_.elementwise,
      [&](std::int64_t begin, std::int64_t end, float* dgamma, float* dbeta) {
        kernels_.layer_norm->backward(args, begin, end, dgamma, dbeta);
      },
      args.dgamma, args.dbeta);
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
  const PartialSums partials(rows, hidden_size);
  fill_zero(args.dgamma_tangent);
  fill_zero(args.dbeta_tangent);
  partials.add(
      scratch(partials.bytes()), *kernels_.elementwise,
      [&](std::int64_t begin, std::int64_t end, float* dgamma, float* dbeta) {
        kernels_.layer_norm->backward_tangent(args, begin, end, dgamma, dbeta);
      },
      args.dgamma_tangent, args.dbeta_tangent);
}

}  // namespace bitfall
