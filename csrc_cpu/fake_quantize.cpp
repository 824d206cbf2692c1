// Fake quantization on the CPU: threads share the groups of a tensor or, where groups are large,
// the chunks of each group.
#include <omp.h>

#include <algorithm>
#include <vector>

#include "core/operation_checks.h"
#include "csrc_cpu/cpu_backend.h"
#include "csrc_cpu/parallel.h"

namespace bitfall {
namespace {

// Elements per piece of work: 64 KB of f32, and the unit of ordered sums.
constexpr std::int64_t kChunk = kQuantSumChunk;

QuantRange find_range(const FakeQuantizeKernels& kernels, const float* x, std::int64_t numel) {
  const std::int64_t chunks = (numel + kChunk - 1) / kChunk;
  QuantRange whole;
  std::int32_t min_key = whole.min_key, max_key = whole.max_key;
#pragma omp parallel for schedule(static) reduction(min        \
                                                    : min_key) \
    reduction(max                                              \
              : max_key) if (chunks > 1)
  for (std::int64_t chunk = 0; chunk < chunks; ++chunk) {
    const std::int64_t begin = chunk * kChunk;
    QuantRange range{min_key, max_key};
    kernels.widen_range(x + begin, std::min(kChunk, numel - begin), range);
    min_key = range.min_key;
    max_key = range.max_key;
  }
  return {min_key, max_key};
}

MagnitudeSum find_sum(const FakeQuantizeKernels& kernels, const float* x, std::int64_t numel,
                      float threshold) {
  std::vector<MagnitudeSum> partial(static_cast<std::size_t>((numel + kChunk - 1) / kChunk));
  parallel_ranges(numel, kChunk, [&](std::int64_t begin, std::int64_t end) {
    partial[static_cast<std::size_t>(begin / kChunk)] =
        kernels.magnitude_sum(x + begin, end - begin, threshold);
  });
  MagnitudeSum total;
  for (const MagnitudeSum& part : partial) {
    total.sum += part.sum;
    total.count += part.count;
  }
  return total;
}

QuantGroup find_group(const FakeQuantizeKernels& kernels, const QuantSpec& spec, const float* x,
                      std::int64_t numel) {
  const QuantRange range = find_range(kernels, x, numel);
  if (!is_sign_quantized(spec.bits)) return uniform_group(spec.bits, spec.q_type, range);
  const MagnitudeSum all = find_sum(kernels, x, numel, kNoThreshold);
  if (spec.bits == 1) return sign_group(range, 0.0f, all);
  const float threshold = ternary_threshold(all);
  return sign_group(range, threshold, find_sum(kernels, x, numel, threshold));
}

/// Quantizes group number `group` of the tensor that `whole` describes.
void quantize_group(const FakeQuantizeKernels& kernels, const QuantizeChunk& whole,
                    const Tensor& working, std::int64_t group) {
  const std::int64_t numel = whole.numel / whole.spec.groups;
  const std::int64_t first = group * numel;
  const QuantGroup found = find_group(kernels, whole.spec, whole.master + first, numel);
  parallel_ranges(numel, kChunk, [&](std::int64_t begin, std::int64_t end) {
    QuantizeChunk chunk = whole;
    chunk.group = found;
    chunk.element = whole.key.first_element + first + begin;
    chunk.numel = end - begin;
    chunk.master = whole.master + first + begin;
    chunk.working = element(working, first + begin);
    kernels.quantize(chunk);
  });
}

}  // namespace

void CpuBackend::fake_quantize(const QuantSpec& spec, const StochasticKey& key, float mix,
                               const Tensor& master, const Tensor& working) {
  check_fake_quantize(spec, master, working);
  if (spec.bits >= kCastBits) return cast(master, working);
  if (master.numel() == 0) return;

  QuantizeChunk whole;
  whole.master = master.as<float>();
  whole.dtype = working.dtype;
  whole.numel = master.numel();
  whole.spec = spec;
  whole.key = key;
  whole.mix = mix;
  // Enough groups keep every thread busy with groups of its own, without a wait in between; the
  // loops inside a group are then serial (no nested parallelism).
  const bool share_groups =
      spec.groups >= 4 * omp_get_max_threads() || spec.groups % omp_get_max_threads() == 0;
#pragma omp parallel for schedule(static) if (share_groups && master.numel() > kChunk)
  for (std::int64_t group = 0; group < spec.groups; ++group)
    quantize_group(*kernels_.fake_quantize, whole, working, group);
}

}  // namespace bitfall
