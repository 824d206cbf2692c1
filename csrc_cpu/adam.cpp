// The optimizer's update and the vector operations over flat f32 buffers.
#include <vector>

#include "core/checks.h"
#include "core/operation_checks.h"
#include "csrc_cpu/cpu_backend.h"
#include "csrc_cpu/parallel.h"

namespace bitfall {
namespace {

// Elements per piece of work; also the unit of ordered sums, so it must not depend on threads.
constexpr std::int64_t kChunk = 16384;

}  // namespace

double CpuBackend::squared_sum(const Tensor& x) { return dot(x, x); }

void CpuBackend::decide_update(const Tensor& loss, const Tensor& gradient,
                               const UpdateLimits& limits, const Tensor& decision) {
  decide_update(loss, squared_sum(gradient), limits, decision);
}

void CpuBackend::decide_update(const Tensor& loss, double squared_norm, const UpdateLimits& limits,
                               const Tensor& decision) {
  check_decide_update(loss, decision);
  last_decision_ = decided_update(*loss.as<float>(), squared_norm, limits);
  *decision.as<UpdateDecision>() = last_decision_;
}

double CpuBackend::dot(const Tensor& x, const Tensor& y) {
  check_vector("dot", "x", x, x.numel());
  check_vector("dot", "y", y, x.numel());
  const float *x_data = x.as<float>(), *y_data = y.as<float>();
  std::vector<double> partial(static_cast<std::size_t>((x.numel() + kChunk - 1) / kChunk));
  parallel_ranges(x.numel(), kChunk, [&](std::int64_t begin, std::int64_t end) {
    partial[static_cast<std::size_t>(begin / kChunk)] =
        kernels_.adam->dot(x_data + begin, y_data + begin, end - begin);
  });
  double total = 0;
  for (const double part : partial) total += part;
  return total;
}

void CpuBackend::axpby(float alpha, const Tensor& x, float beta, const Tensor& y) {
  check_vector("axpby", "x", x, x.numel());
  check_vector("axpby", "y", y, x.numel());
  const float* x_data = x.as<float>();
  float* y_data = y.as<float>();
  parallel_ranges(x.numel(), kChunk, [&](std::int64_t begin, std::int64_t end) {
    kernels_.adam->axpby(alpha, x_data + begin, beta, y_data + begin, end - begin);
  });
}

void CpuBackend::adam_update(std::span<const AdamRange> ranges, const AdamTensors& tensors,
                             std::span<const FakeQuantizeRange> published, const Tensor& working) {
  check_adam(ranges, tensors, published, working);
  const auto* const decided = tensors.decision.as<const UpdateDecision>();
  if (decided->skip == 0) update_masters(ranges, tensors, decided->gradient_multiplier);
  if (!published.empty()) fake_quantize(published, tensors.master, working);
}

void CpuBackend::update_masters(std::span<const AdamRange> ranges, const AdamTensors& tensors,
                                float multiplier) {
#pragma omp parallel if (tensors.master.numel() > kChunk)
  for (const AdamRange& range : ranges) {
    // The ranges of an update are disjoint, so no thread waits for the others between them.
#pragma omp for schedule(static) nowait
    for (std::int64_t first = 0; first < range.numel; first += kChunk) {
      const std::int64_t begin = range.begin + first;
      const std::int64_t rest = range.numel - first;
      kernels_.adam->update(
          range.step, multiplier,
          {tensors.gradient.as<float>() + begin, tensors.master.as<float>() + begin,
           tensors.exp_avg.as<float>() + begin, tensors.exp_avg_sq.as<float>() + begin,
           rest < kChunk ? rest : kChunk});
    }
  }
}

}  // namespace bitfall
