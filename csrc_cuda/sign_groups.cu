// Compiled without fused multiply-add (see CMakeLists.txt), as all that has the CPU's bits.
#include <algorithm>

#include "csrc_cuda/quant_range.cuh"
#include "csrc_cuda/ranges.cuh"
#include "csrc_cuda/sign_groups.h"

namespace bitfall {
namespace {

/// The table as kernels see it, and what they find: sums first, which need the widest alignment.
struct Work {
  const QuantizeEntry* entries;
  int count;
  std::int64_t chunk_count, group_count;
  MagnitudeSum* sums;  ///< per chunk
  QuantRange* ranges;  ///< per chunk
  QuantGroup* groups;

  Work(const QuantizeTable& table, void* scratch)
      : entries(table.entries()),
        count(table.count()),
        chunk_count(table.chunks()),
        group_count(table.groups()),
        sums(static_cast<MagnitudeSum*>(scratch)),
        ranges(reinterpret_cast<QuantRange*>(sums + chunk_count)),
        groups(reinterpret_cast<QuantGroup*>(ranges + chunk_count)) {}
};

/// What a pass over the weights is for: ranges, and means of ternary and binary groups; or means of
/// what lies above the thresholds of ternary ones.
enum class Sum { all, above_threshold };

/// work.ranges[chunk] and work.sums[chunk] = magnitude_sum of each chunk, a thread per lane of its
/// definition.
__global__ void magnitude_kernel(Work work, Sum what, const float* master) {
  __shared__ WarpRanges warp_ranges;
  __shared__ double lane_sums[kQuantThreads];
  __shared__ int counts[kQuantWarps];
  for (std::int64_t chunk = blockIdx.x; chunk < work.chunk_count; chunk += gridDim.x) {
    const QuantizeEntry& entry =
        entry_of<&QuantizeEntry::first_chunk>(work.entries, work.count, chunk);
    if (what == Sum::above_threshold && entry.range.spec.bits != 2) continue;
    const QuantChunks::Chunk at = entry.chunks[chunk - entry.first_chunk];
    const float threshold =
        what == Sum::all ? kNoThreshold : work.groups[entry.first_group + at.group].threshold;
    const float* const weights = master + entry.range.begin;
    QuantRange range;
    double sum = 0;
    int count = 0;
    for (std::int64_t i = at.begin + threadIdx.x; i < at.end; i += kQuantThreads) {
      widen_range(range, weights[i]);
      const float value = magnitude(weights[i]);
      sum += static_cast<double>(value > threshold ? value : 0.0f);
      count += value > threshold ? 1 : 0;
    }
    range = block_range(range, warp_ranges);
    count = block_sum(count, counts);  // also waits for the last readers of lane_sums
    lane_sums[threadIdx.x] = sum;
    for (int half = kQuantThreads / 2; half > 0; half /= 2) {
      __syncthreads();
      if (static_cast<int>(threadIdx.x) < half)
        lane_sums[threadIdx.x] += lane_sums[threadIdx.x + half];
    }
    if (threadIdx.x != 0) continue;
    work.ranges[chunk] = range;
    work.sums[chunk] = {lane_sums[0], count};
  }
}

/// What group_kernel finds: all of every group, or only the thresholds of ternary weights.
enum class Find { thresholds, groups };

/// work.groups[g] from the ranges and sums of its chunks.
__global__ void group_kernel(Work work, Find find) {
  __shared__ WarpRanges warp_ranges;
  for (std::int64_t number = blockIdx.x; number < work.group_count; number += gridDim.x) {
    const QuantizeEntry& entry =
        entry_of<&QuantizeEntry::first_group>(work.entries, work.count, number);
    const int bits = entry.range.spec.bits;
    if (find == Find::thresholds ? bits != 2 : !is_sign_quantized(bits)) continue;
    const std::int64_t chunks = entry.chunks.chunks_per_group;
    const std::int64_t first = entry.first_chunk + (number - entry.first_group) * chunks;
    QuantRange range;
    for (std::int64_t i = threadIdx.x; i < chunks; i += kQuantThreads)
      widen_range(range, work.ranges[first + i]);
    range = block_range(range, warp_ranges);
    if (threadIdx.x != 0) continue;
    MagnitudeSum total;
    for (std::int64_t i = 0; i < chunks; ++i) {
      total.sum += work.sums[first + i].sum;
      total.count += work.sums[first + i].count;
    }
    QuantGroup& group = work.groups[number];
    if (find == Find::thresholds) {
      group.threshold = ternary_threshold(total);
    } else {
      group = sign_group(range, bits == 1 ? 0.0f : group.threshold, total);
    }
  }
}

/// Blocks for `count` pieces of work, which they take in turns.
unsigned blocks_of(std::int64_t count) {
  return static_cast<unsigned>(std::min(count, std::int64_t{1} << 20));
}

}  // namespace

std::size_t sign_groups_scratch_bytes(const QuantizeTable& table) {
  return static_cast<std::size_t>(table.chunks()) * (sizeof(MagnitudeSum) + sizeof(QuantRange)) +
         static_cast<std::size_t>(table.groups()) * sizeof(QuantGroup);
}

const QuantGroup* find_sign_groups(const QuantizeTable& table, const float* master, void* scratch,
                                   cudaStream_t stream) {
  const Work work(table, scratch);
  const unsigned chunk_blocks = blocks_of(work.chunk_count);
  const unsigned group_blocks = blocks_of(work.group_count);
  const auto sum = [&](Sum what) {
    magnitude_kernel<<<chunk_blocks, kQuantThreads, 0, stream>>>(work, what, master);
    check_launch("fake_quantize");
  };
  const auto find = [&](Find what) {
    group_kernel<<<group_blocks, kQuantThreads, 0, stream>>>(work, what);
    check_launch("fake_quantize");
  };
  sum(Sum::all);
  if (table.has_ternary()) {
    find(Find::thresholds);
    sum(Sum::above_threshold);
  }
  find(Find::groups);
  return work.groups;
}

}  // namespace bitfall
