// The optimizer's update and the vector operations over flat f32 buffers.
#include "csrc_cpu/kernels/adam.h"

#include <algorithm>
#include <vector>

#include "csrc_cpu/cpu_backend.h"

namespace bitfall {
namespace {

// Elements per piece of work: also the unit of ordered sums, so it must not depend on threads.
constexpr std::int64_t kChunk = 16384;

std::int64_t chunk_count(std::int64_t numel) { return (numel + kChunk - 1) / kChunk; }

std::int64_t chunk_size(std::int64_t numel, std::int64_t chunk) {
  return std::min(kChunk, numel - chunk * kChunk);
}

void check_vector(const char* what, const Tensor& tensor, std::int64_t numel) {
  check<UnsupportedError>(tensor.dtype == DType::f32, what, " is ", name(tensor.dtype),
                          ", expected f32");
  check<ShapeError>(tensor.numel() == numel, what, " has ", tensor.numel(), " elements, expected ",
                    numel);
}

}  // namespace

double CpuBackend::squared_sum(const Tensor& x) { return dot(x, x); }

double CpuBackend::dot(const Tensor& x, const Tensor& y) {
  check_vector("dot: x", x, x.numel());
  check_vector("dot: y", y, x.numel());
  const std::int64_t numel = x.numel(), chunks = chunk_count(numel);
  const float *x_data = x.as<float>(), *y_data = y.as<float>();
  std::vector<double> partial(static_cast<std::size_t>(chunks));
#pragma omp parallel for schedule(static) if (chunks > 1)
  for (std::int64_t chunk = 0; chunk < chunks; ++chunk) {
    const std::int64_t begin = chunk * kChunk;
    partial[static_cast<std::size_t>(chunk)] =
        kernels_.adam->dot(x_data + begin, y_data + begin, chunk_size(numel, chunk));
  }
  double total = 0;
  for (const double part : partial) total += part;
  return total;
}

void CpuBackend::axpby(float alpha, const Tensor& x, float beta, const Tensor& y) {
  check_vector("axpby: x", x, x.numel());
  check_vector("axpby: y", y, x.numel());
  const std::int64_t numel = x.numel(), chunks = chunk_count(numel);
  const float* x_data = x.as<float>();
  float* y_data = y.as<float>();
#pragma omp parallel for schedule(static) if (chunks > 1)
  for (std::int64_t chunk = 0; chunk < chunks; ++chunk) {
    const std::int64_t begin = chunk * kChunk;
    kernels_.adam->axpby(alpha, x_data + begin, beta, y_data + begin, chunk_size(numel, chunk));
  }
}

void CpuBackend::adam_update(const AdamStep& step, std::span<const DecayRange> ranges,
                             const Tensor& gradient, const Tensor& master, const Tensor& exp_avg,
                             const Tensor& exp_avg_sq) {
  const std::int64_t numel = master.numel();
  check_vector("adam_update: master", master, numel);
  check_vector("adam_update: gradient", gradient, numel);
  check_vector("adam_update: exp_avg", exp_avg, numel);
  check_vector("adam_update: exp_avg_sq", exp_avg_sq, numel);
  for (const DecayRange& range : ranges) {
    check<ShapeError>(range.begin >= 0 && range.numel >= 0 && range.numel <= numel - range.begin,
                      "adam_update: range ", range.begin, "..", range.begin + range.numel,
                      " is outside of ", numel, " elements");
  }
#pragma omp parallel if (numel > kChunk)
  for (const DecayRange& range : ranges) {
    const std::int64_t chunks = chunk_count(range.numel);
    // Ranges are disjoint, so no thread waits for the others between them.
#pragma omp for schedule(static) nowait
    for (std::int64_t chunk = 0; chunk < chunks; ++chunk) {
      const std::int64_t begin = range.begin + chunk * kChunk;
      kernels_.adam->update(
          step, range.weight_decay,
          {gradient.as<float>() + begin, master.as<float>() + begin, exp_avg.as<float>() + begin,
           exp_avg_sq.as<float>() + begin, chunk_size(range.numel, chunk)});
    }
  }
}

}  // namespace bitfall
