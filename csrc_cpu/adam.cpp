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

void CpuBackend::adam_update(const AdamStep& step, std::span<const DecayRange> ranges,
                             const Tensor& decision, const Tensor& gradient, const Tensor& master,
                             const Tensor& exp_avg, const Tensor& exp_avg_sq) {
  check_adam(ranges, decision, gradient, master, exp_avg, exp_avg_sq);
  const auto* const decided = decision.as<const UpdateDecision>();
  if (decided->skip != 0) return;
  const float multiplier = decided->gradient_multiplier;
  const std::int64_t numel = master.numel();
#pragma omp parallel if (numel > kChunk)
  for (const DecayRange& range : ranges) {
    // The ranges of an update are disjoint, so no thread waits for the others between them.
#pragma omp for schedule(static) nowait
    for (std::int64_t first = 0; first < range.numel; first += kChunk) {
      const std::int64_t begin = range.begin + first;
      const std::int64_t rest = range.numel - first;
      kernels_.adam->update(
          step, range.weight_decay, multiplier,
          {gradient.as<float>() + begin, master.as<float>() + begin, exp_avg.as<float>() + begin,
           exp_avg_sq.as<float>() + begin, rest < kChunk ? rest : kChunk});
    }
  }
}

}  // namespace bitfall
