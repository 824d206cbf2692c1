// Fake quantization, bit for bit what the CPU writes: both take every formula, and the order of the
// sums behind ternary and binary scales, from quantizer/quant_math.h. Compiled without fused
// multiply-add (see CMakeLists.txt).
//
// A chunk is the work of one block, whatever range it lies in: first the chunks' ranges (and sums),
// then one QuantGroup per group, then the weights.
#include "core/operation_checks.h"
#include "csrc_cuda/cuda_backend.h"
#include "csrc_cuda/element.cuh"
#include "csrc_cuda/quantize_table.h"
#include "csrc_cuda/ranges.cuh"
#include "csrc_cuda/reduce.cuh"

namespace bitfall {
namespace {

constexpr int kLanes = 256;  ///< threads of a block; also the lanes of quant_math.h's magnitude_sum

/// A QuantizeTable as kernels see it, and what they find: sums first, which need the widest
/// alignment.
struct Work {
  const QuantizeEntry* entries;
  int count;
  std::int64_t chunk_count, group_count;
  MagnitudeSum* sums;  ///< per chunk
  QuantRange* ranges;  ///< per chunk
  QuantGroup* groups;

  static std::size_t scratch_bytes(const QuantizeTable& table) {
    return static_cast<std::size_t>(table.chunks()) * (sizeof(MagnitudeSum) + sizeof(QuantRange)) +
           static_cast<std::size_t>(table.groups()) * sizeof(QuantGroup);
  }
  Work(const QuantizeTable& table, void* scratch)
      : entries(table.entries()),
        count(table.count()),
        chunk_count(table.chunks()),
        group_count(table.groups()),
        sums(static_cast<MagnitudeSum*>(scratch)),
        ranges(reinterpret_cast<QuantRange*>(sums + chunk_count)),
        groups(reinterpret_cast<QuantGroup*>(ranges + chunk_count)) {}
};

/// Where a chunk lies in the buffers.
struct ChunkPlace {
  const QuantizeEntry& entry;
  std::int64_t group;  ///< of those of all ranges
  std::int64_t begin, end;

  __device__ ChunkPlace(const Work& work, std::int64_t chunk)
      : entry(entry_of<&QuantizeEntry::first_chunk>(work.entries, work.count, chunk)) {
    const QuantChunks::Chunk at = entry.chunks[chunk - entry.first_chunk];
    group = entry.first_group + at.group;
    begin = entry.range.begin + at.begin;
    end = entry.range.begin + at.end;
  }
  __device__ int bits() const { return entry.range.spec.bits; }
};

/// Smallest and largest key over the block, in every thread. `shared` [2 * warps].
__device__ QuantRange block_range(QuantRange range, std::int32_t* shared) {
  const int warp = static_cast<int>(threadIdx.x / kWarpThreads);
  range.min_key = __reduce_min_sync(kWholeWarp, range.min_key);
  range.max_key = __reduce_max_sync(kWholeWarp, range.max_key);
  __syncthreads();  // the last readers of `shared` are done
  if (threadIdx.x % kWarpThreads == 0) {
    shared[2 * warp] = range.min_key;
    shared[2 * warp + 1] = range.max_key;
  }
  __syncthreads();
  for (int other = 0; other < kLanes / kWarpThreads; ++other) {
    range.min_key = min(range.min_key, shared[2 * other]);
    range.max_key = max(range.max_key, shared[2 * other + 1]);
  }
  return range;
}

/// work.ranges[chunk] = smallest and largest key of each chunk.
__global__ void range_kernel(Work work, const float* master) {
  __shared__ std::int32_t shared[2 * kLanes / kWarpThreads];
  for (std::int64_t chunk = blockIdx.x; chunk < work.chunk_count; chunk += gridDim.x) {
    const ChunkPlace at(work, chunk);
    if (at.bits() >= kCastBits) continue;
    QuantRange range;
    for (std::int64_t i = at.begin / 8 * 8 + 8 * threadIdx.x; i < at.end; i += 8 * kLanes) {
      const Eight values = load_eight(master, i, at.begin, at.end);
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        if (i + j < at.begin || i + j >= at.end) continue;
        const std::int32_t key = order_key(values.value[j]);
        range.min_key = min(range.min_key, key);
        range.max_key = max(range.max_key, key);
      }
    }
    range = block_range(range, shared);
    if (threadIdx.x == 0) work.ranges[chunk] = range;
  }
}

/// What a pass over the sums of magnitudes is for: means of ternary and binary groups, or means of
/// what lies above the thresholds of ternary ones.
enum class Sum { all, above_threshold };

/// work.sums[chunk] = magnitude_sum of each chunk, a thread per lane of its definition.
__global__ void magnitude_kernel(Work work, Sum what, const float* master) {
  __shared__ double lane_sums[kLanes];
  __shared__ int counts[kLanes / kWarpThreads];
  for (std::int64_t chunk = blockIdx.x; chunk < work.chunk_count; chunk += gridDim.x) {
    const ChunkPlace at(work, chunk);
    if (what == Sum::all ? !is_sign_quantized(at.bits()) : at.bits() != 2) continue;
    const float threshold = what == Sum::all ? kNoThreshold : work.groups[at.group].threshold;
    double sum = 0;
    int count = 0;
    for (std::int64_t i = at.begin + threadIdx.x; i < at.end; i += kLanes) {
      const float value = magnitude(master[i]);
      sum += static_cast<double>(value > threshold ? value : 0.0f);
      count += value > threshold ? 1 : 0;
    }
    count = block_sum(count, counts);  // also waits for the last readers of lane_sums
    lane_sums[threadIdx.x] = sum;
    for (int half = kLanes / 2; half > 0; half /= 2) {
      __syncthreads();
      if (static_cast<int>(threadIdx.x) < half)
        lane_sums[threadIdx.x] += lane_sums[threadIdx.x + half];
    }
    if (threadIdx.x == 0) work.sums[chunk] = {lane_sums[0], count};
  }
}

/// What group_kernel finds: all of every group, or only the thresholds of ternary weights.
enum class Find { thresholds, groups };

/// work.groups[g] from the ranges and sums of its chunks.
__global__ void group_kernel(Work work, Find find) {
  __shared__ std::int32_t shared[2 * kLanes / kWarpThreads];
  for (std::int64_t number = blockIdx.x; number < work.group_count; number += gridDim.x) {
    const QuantizeEntry& entry =
        entry_of<&QuantizeEntry::first_group>(work.entries, work.count, number);
    const QuantSpec& spec = entry.range.spec;
    if (find == Find::thresholds ? spec.bits != 2 : spec.bits >= kCastBits) continue;
    const std::int64_t chunks = entry.chunks.chunks_per_group;
    const std::int64_t first = entry.first_chunk + (number - entry.first_group) * chunks;
    QuantRange range;
    for (std::int64_t i = threadIdx.x; i < chunks; i += kLanes) {
      range.min_key = min(range.min_key, work.ranges[first + i].min_key);
      range.max_key = max(range.max_key, work.ranges[first + i].max_key);
    }
    range = block_range(range, shared);
    if (threadIdx.x != 0) continue;
    QuantGroup& group = work.groups[number];
    if (!is_sign_quantized(spec.bits)) {
      group = uniform_group(spec.bits, spec.q_type, range);
      continue;
    }
    MagnitudeSum total;
    for (std::int64_t i = 0; i < chunks; ++i) {
      total.sum += work.sums[first + i].sum;
      total.count += work.sums[first + i].count;
    }
    if (find == Find::thresholds) {
      group.threshold = ternary_threshold(total);
    } else {
      group = sign_group(range, spec.bits == 1 ? 0.0f : group.threshold, total);
    }
  }
}

/// The working weight of master value `g` before it is rounded to the compute dtype.
struct Quantize {
  int bits;
  CodeLimits limits;
  float mix;
  QuantGroup group;

  __device__ Quantize(const FakeQuantizeRange& range, const QuantGroup& group)
      : bits(range.spec.bits),
        limits(range.spec.bits, range.spec.q_type),
        mix(range.mix),
        group(group) {}

  __device__ float operator()(float g, float offset) const {
    if (bits >= kCastBits) return g;
    const float code =
        is_sign_quantized(bits) ? sign_code(g, group) : uniform_code(g, group, limits, offset);
    return blend(mix, g, dequantize(code, group));
  }
};

template <typename T>
__device__ void quantize_nearest(const Quantize& quantize, const ChunkPlace& at,
                                 const float* master, T* working) {
  for (std::int64_t i = at.begin / 8 * 8 + 8 * threadIdx.x; i < at.end; i += 8 * kLanes) {
    Eight values = load_eight(master, i, at.begin, at.end);
#pragma unroll
    for (int j = 0; j < 8; ++j) values.value[j] = quantize(values.value[j], 0.0f);
    store_eight(working, i, at.begin, at.end, values);
  }
}

/// Sixteen threads take a stochastic block, whose Philox results they exchange: each draws the
/// numbers of eight elements 16 apart, and quantizes eight neighbours. Blocks are counted in the
/// parameter, of which the range may be a part.
template <typename T>
__device__ void quantize_stochastic(const Quantize& quantize, const ChunkPlace& at,
                                    const float* master, T* working) {
  alignas(16) __shared__ std::uint16_t shared[kLanes / 16][kStochasticBlock];
  const auto lane = static_cast<std::uint32_t>(threadIdx.x % 16);
  std::uint16_t* const numbers = shared[threadIdx.x / 16];
  const StochasticKey key = at.entry.range.key;
  // Element 0 of the parameter, as if all of it were there.
  const std::int64_t origin = at.entry.range.begin - key.first_element;
  for (std::int64_t first = (at.begin - origin) / kStochasticBlock;
       origin + first * kStochasticBlock < at.end; first += kLanes / 16) {
    const std::int64_t block = first + threadIdx.x / 16;
    const PhiloxBlock random =
        philox(stochastic_counter(key, block, lane), stochastic_philox_key(key));
    __syncwarp();  // the last readers of `numbers` are done
#pragma unroll
    for (int j = 0; j < 8; ++j)
      numbers[16 * j + lane] =
          static_cast<std::uint16_t>((random.word[j / 2] >> (16 * (j % 2))) & 0xffffu);
    __syncwarp();
    const std::int64_t i = origin + block * kStochasticBlock + 8 * lane;
    Eight values = load_eight(master, i, at.begin, at.end);
#pragma unroll
    for (int j = 0; j < 8; ++j)
      values.value[j] = quantize(values.value[j], stochastic_offset(numbers[8 * lane + j]));
    store_eight(working, i, at.begin, at.end, values);
  }
}

/// May run in place: every element is read and written by one thread. Chunks go backwards, since
/// those that were read last may still be in the cache.
template <typename T>
__global__ void quantize_kernel(Work work, const float* master, T* working) {
  for (std::int64_t rest = work.chunk_count - blockIdx.x; rest > 0; rest -= gridDim.x) {
    const ChunkPlace at(work, rest - 1);
    const Quantize quantize(at.entry.range, work.groups[at.group]);
    if (at.entry.range.spec.rounding == Rounding::stochastic && at.bits() < kCastBits) {
      quantize_stochastic(quantize, at, master, working);
    } else {
      quantize_nearest(quantize, at, master, working);
    }
  }
}

/// Blocks for `count` pieces of work, which they take in turns.
unsigned blocks_of(std::int64_t count) {
  constexpr std::int64_t kMostBlocks = std::int64_t{1} << 20;
  return static_cast<unsigned>(count < kMostBlocks ? count : kMostBlocks);
}

void find_groups(const QuantizeTable& table, const Work& work, const float* master,
                 cudaStream_t stream) {
  const unsigned blocks = blocks_of(work.chunk_count), group_blocks = blocks_of(work.group_count);
  const auto find = [&](Find what) {
    group_kernel<<<group_blocks, kLanes, 0, stream>>>(work, what);
    check_launch("fake_quantize");
  };
  const auto sum = [&](Sum what) {
    magnitude_kernel<<<blocks, kLanes, 0, stream>>>(work, what, master);
    check_launch("fake_quantize");
  };
  range_kernel<<<blocks, kLanes, 0, stream>>>(work, master);
  check_launch("fake_quantize");
  if (table.has_bits(1, 2)) sum(Sum::all);
  if (table.has_bits(2, 2)) {
    find(Find::thresholds);
    sum(Sum::above_threshold);
  }
  find(Find::groups);
}

}  // namespace

void CudaBackend::fake_quantize(std::span<const FakeQuantizeRange> ranges, const Tensor& master,
                                const Tensor& working) {
  check_fake_quantize(ranges, master, working);
  QuantizeTable& table = *quantize_table_;
  table.set(*this, ranges);
  if (table.chunks() == 0) return;
  const Work work(table, scratch(Work::scratch_bytes(table)));
  const cudaStream_t stream = this->stream();
  const auto* const source = device_data<const float>(master);
  if (table.has_bits(1, kCastBits - 1)) find_groups(table, work, source, stream);
  visit_dtype(working.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    quantize_kernel<T>
        <<<blocks_of(work.chunk_count), kLanes, 0, stream>>>(work, source, device_data<T>(working));
  });
  check_launch("fake_quantize");
}

}  // namespace bitfall
