// Fake quantization on the CPU: threads share the chunks of all ranges, in a few passes.
#include <algorithm>
#include <vector>

#include "core/operation_checks.h"
#include "csrc_cpu/cpu_backend.h"
#include "csrc_cpu/parallel.h"

namespace bitfall {
namespace {

template <typename Vector>
auto& at(Vector& values, std::int64_t index) {
  return values[static_cast<std::size_t>(index)];
}

/// One range, and how many chunks and groups lie in those before it.
struct Entry {
  const FakeQuantizeRange& range;
  QuantChunks chunks;
  std::int64_t first_chunk = 0, first_group = 0;

  int bits() const { return range.spec.bits; }
};

/// The passes over all ranges. Every thread of a parallel region calls run().
class RangesQuantizer {
 public:
  RangesQuantizer(const KernelTable& kernels, std::span<const FakeQuantizeRange> ranges,
                  const Tensor& master, const Tensor& working)
      : kernels_(kernels), master_(master.as<float>()), working_(working) {
    for (const FakeQuantizeRange& range : ranges) {
      if (range.numel == 0) continue;
      entries_.push_back({range, {range.numel, range.spec.groups}, num_chunks_, num_groups_});
      num_chunks_ += entries_.back().chunks.count;
      num_groups_ += range.spec.groups;
      has_ternary_ = has_ternary_ || range.spec.bits == 2;
      has_signs_ = has_signs_ || is_sign_quantized(range.spec.bits);
    }
    ranges_.resize(static_cast<std::size_t>(num_chunks_));
    if (has_signs_) sums_.resize(ranges_.size());
    groups_.resize(static_cast<std::size_t>(num_groups_));
  }

  void run() {
    for_each_chunk([&](const Entry& entry, std::int64_t index) { find_range(entry, index); });
    if (has_ternary_) {
      for_each_group([&](const Entry& entry, std::int64_t index) {
        if (entry.bits() == 2)
          at(groups_, index).threshold = ternary_threshold(sum_of(entry, index));
      });
      for_each_chunk([&](const Entry& entry, std::int64_t index) {
        if (entry.bits() == 2) find_sum(entry, index, group_at(entry, index).threshold);
      });
    }
    for_each_group([&](const Entry& entry, std::int64_t index) { find_group(entry, index); });
    for_each_chunk([&](const Entry& entry, std::int64_t index) { write(entry, index); });
  }

 private:
  struct Piece {
    std::int64_t begin, numel;
  };

  /// body(entry, index) for the chunks of all ranges; ends when all threads are done.
  template <typename Body>
  void for_each_chunk(const Body& body) const {
#pragma omp for schedule(dynamic, 8)
    for (std::int64_t index = 0; index < num_chunks_; ++index)
      body(entry_of(&Entry::first_chunk, index), index);
  }
  template <typename Body>
  void for_each_group(const Body& body) const {
#pragma omp for schedule(static)
    for (std::int64_t index = 0; index < num_groups_; ++index)
      body(entry_of(&Entry::first_group, index), index);
  }

  const Entry& entry_of(std::int64_t Entry::*first, std::int64_t index) const {
    const auto behind = std::upper_bound(
        entries_.begin(), entries_.end(), index,
        [first](std::int64_t value, const Entry& entry) { return value < entry.*first; });
    return *(behind - 1);
  }

  void find_range(const Entry& entry, std::int64_t index) {
    if (entry.bits() >= kCastBits) return;
    const Piece piece = place(entry, index);
    QuantRange range;
    kernels_.fake_quantize->widen_range(master_ + piece.begin, piece.numel, range);
    at(ranges_, index) = range;
    if (is_sign_quantized(entry.bits())) find_sum(entry, index, kNoThreshold);
  }

  void find_sum(const Entry& entry, std::int64_t index, float threshold) {
    const Piece piece = place(entry, index);
    at(sums_, index) =
        kernels_.fake_quantize->magnitude_sum(master_ + piece.begin, piece.numel, threshold);
  }

  void find_group(const Entry& entry, std::int64_t index) {
    if (entry.bits() >= kCastBits) return;
    QuantRange range;
    for (const QuantRange& part : of_group(ranges_, entry, index)) {
      range.min_key = std::min(range.min_key, part.min_key);
      range.max_key = std::max(range.max_key, part.max_key);
    }
    QuantGroup& group = at(groups_, index);
    if (!is_sign_quantized(entry.bits())) {
      group = uniform_group(entry.bits(), entry.range.spec.q_type, range);
    } else {
      group = sign_group(range, entry.bits() == 1 ? 0.0f : group.threshold, sum_of(entry, index));
    }
  }

  MagnitudeSum sum_of(const Entry& entry, std::int64_t group) const {
    MagnitudeSum total;
    for (const MagnitudeSum& part : of_group(sums_, entry, group)) {
      total.sum += part.sum;
      total.count += part.count;
    }
    return total;
  }

  void write(const Entry& entry, std::int64_t index) const {
    const Piece piece = place(entry, index);
    const float* const master = master_ + piece.begin;
    void* const working = element(working_, piece.begin);
    if (entry.bits() >= kCastBits) {
      kernels_.elementwise->cast(DType::f32, master, working_.dtype, working, piece.numel);
      return;
    }
    const FakeQuantizeRange& range = entry.range;
    kernels_.fake_quantize->quantize(
        {.master = master,
         .working = working,
         .dtype = working_.dtype,
         .numel = piece.numel,
         .element = range.key.first_element + piece.begin - range.begin,
         .spec = range.spec,
         .group = group_at(entry, index),
         .key = range.key,
         .mix = range.mix});
  }

  /// Where chunk number `index` lies in the buffers.
  static Piece place(const Entry& entry, std::int64_t index) {
    const QuantChunks::Chunk chunk = entry.chunks[index - entry.first_chunk];
    return {entry.range.begin + chunk.begin, chunk.end - chunk.begin};
  }

  const QuantGroup& group_at(const Entry& entry, std::int64_t chunk) const {
    return at(groups_, entry.first_group + entry.chunks[chunk - entry.first_chunk].group);
  }

  /// What was found in the chunks of a group.
  template <typename T>
  static std::span<const T> of_group(const std::vector<T>& found, const Entry& entry,
                                     std::int64_t group) {
    const std::int64_t count = entry.chunks.chunks_per_group;
    const std::int64_t first = entry.first_chunk + (group - entry.first_group) * count;
    return std::span(found).subspan(static_cast<std::size_t>(first),
                                    static_cast<std::size_t>(count));
  }

  const KernelTable& kernels_;
  const float* master_;
  const Tensor& working_;
  std::vector<Entry> entries_;
  std::int64_t num_chunks_ = 0, num_groups_ = 0;
  bool has_ternary_ = false, has_signs_ = false;
  std::vector<QuantRange> ranges_;  ///< per chunk
  std::vector<MagnitudeSum> sums_;  ///< per chunk, if there are ternary or binary weights
  std::vector<QuantGroup> groups_;
};

}  // namespace

void CpuBackend::fake_quantize(std::span<const FakeQuantizeRange> ranges, const Tensor& master,
                               const Tensor& working) {
  check_fake_quantize(ranges, master, working);
  RangesQuantizer quantizer(kernels_, ranges, master, working);
#pragma omp parallel if (master.numel() > kQuantSumChunk)
  quantizer.run();
}

}  // namespace bitfall
