// Fake quantization on the CPU: threads share the groups of a tensor or, where groups are large,
// the chunks of each group.
#include "csrc_cpu/kernels/fake_quantize.h"

#include <algorithm>
#include <vector>

#include "csrc_cpu/cpu_backend.h"

namespace bitfall {
namespace {

// 64 KB of f32: a chunk stays in a core's cache between two passes. Also the unit of ordered sums.
constexpr std::int64_t kChunk = kQuantSumChunk;

std::int64_t chunk_count(std::int64_t numel) { return (numel + kChunk - 1) / kChunk; }

std::int64_t chunk_size(std::int64_t numel, std::int64_t chunk) {
  return std::min(kChunk, numel - chunk * kChunk);
}

QuantRange find_range(const FakeQuantizeKernels& kernels, const float* x, std::int64_t numel) {
  const std::int64_t chunks = chunk_count(numel);
  QuantRange whole;
  std::int32_t min_key = whole.min_key, max_key = whole.max_key;
#pragma omp parallel for schedule(static) reduction(min        \
                                                    : min_key) \
    reduction(max                                              \
              : max_key) if (chunks > 1)
  for (std::int64_t chunk = 0; chunk < chunks; ++chunk) {
    QuantRange range{min_key, max_key};
    kernels.widen_range(x + chunk * kChunk, chunk_size(numel, chunk), range);
    min_key = range.min_key;
    max_key = range.max_key;
  }
  return {min_key, max_key};
}

MagnitudeSum find_sum(const FakeQuantizeKernels& kernels, const float* x, std::int64_t numel,
                      float threshold) {
  const std::int64_t chunks = chunk_count(numel);
  std::vector<MagnitudeSum> partial(static_cast<std::size_t>(chunks));
#pragma omp parallel for schedule(static) if (chunks > 1)
  for (std::int64_t chunk = 0; chunk < chunks; ++chunk) {
    partial[static_cast<std::size_t>(chunk)] =
        kernels.magnitude_sum(x + chunk * kChunk, chunk_size(numel, chunk), threshold);
  }
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

/// `part` describes the whole tensor; quantizes its group number `group`.
void quantize_group(const FakeQuantizeKernels& kernels, QuantizeChunk part, std::int64_t group) {
  const std::int64_t numel = part.numel / part.spec.groups;
  const std::int64_t begin = group * numel;
  const std::int64_t chunks = chunk_count(numel);
  const auto item = static_cast<std::int64_t>(size_in_bytes(part.dtype));
  part.group = find_group(kernels, part.spec, part.master + begin, numel);
#pragma omp parallel for schedule(static) firstprivate(part) if (chunks > 1)
  for (std::int64_t chunk = 0; chunk < chunks; ++chunk) {
    QuantizeChunk work = part;
    work.element = begin + chunk * kChunk;
    work.numel = chunk_size(numel, chunk);
    work.master += work.element;
    work.working = static_cast<std::byte*>(part.working) + work.element * item;
    kernels.quantize(work);
  }
}

}  // namespace

void CpuBackend::fake_quantize(const QuantSpec& spec, const StochasticKey& key, float mix,
                               const Tensor& master, const Tensor& working) {
  check_shape("fake_quantize: working", working, master.shape);
  check<UnsupportedError>(master.dtype == DType::f32, "fake_quantize: master is ",
                          name(master.dtype), ", expected f32");
  check<UnsupportedError>(
      working.dtype == DType::f32 || working.dtype == DType::bf16 || working.dtype == DType::f16,
      "fake_quantize: working is ", name(working.dtype), ", expected f32, bf16 or f16");
  check_quant_spec(spec, master.numel());
  if (spec.bits >= kCastBits) return cast(master, working);
  if (master.numel() == 0) return;

  QuantizeChunk whole;
  whole.master = master.as<float>();
  whole.working = working.data;
  whole.dtype = working.dtype;
  whole.numel = master.numel();
  whole.spec = spec;
  whole.key = key;
  whole.mix = mix;
  const FakeQuantizeKernels& kernels = *kernels_.fake_quantize;
  // Groups of one chunk go to one thread each; the loops within larger groups are parallel.
  const bool small_groups = master.numel() / spec.groups <= kChunk;
#pragma omp parallel for schedule(static) if (small_groups && master.numel() > kChunk)
  for (std::int64_t group = 0; group < spec.groups; ++group) quantize_group(kernels, whole, group);
}

}  // namespace bitfall
