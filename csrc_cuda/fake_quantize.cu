// Fake quantization, bit for bit what the CPU writes: both take every formula, and the order of the
// sums behind ternary and binary scales, from quantizer/quant_math.h. Compiled without fused
// multiply-add (see CMakeLists.txt).
//
// A group of any size is cut into chunks of kQuantSumChunk elements; a chunk is the work of one
// block. First the chunks' ranges (and sums), then one QuantGroup per group, then the weights.
#include "core/operation_checks.h"
#include "csrc_cuda/cuda_backend.h"
#include "csrc_cuda/element.cuh"
#include "csrc_cuda/reduce.cuh"
#include "quantizer/quant_math.h"

namespace bitfall {
namespace {

constexpr int kLanes = 256;  ///< threads of a block; also the lanes of quant_math.h's magnitude_sum

/// How a tensor falls into groups and chunks.
struct Chunks {
  std::int64_t group_numel, chunks_per_group, count;

  struct Range {
    std::int64_t group, begin, end;
  };
  __device__ Range range(std::int64_t chunk) const {
    const std::int64_t group = chunk / chunks_per_group;
    const std::int64_t begin = group * group_numel + chunk % chunks_per_group * kQuantSumChunk;
    const std::int64_t group_end = (group + 1) * group_numel;
    return {group, begin, begin + kQuantSumChunk < group_end ? begin + kQuantSumChunk : group_end};
  }
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

/// ranges[chunk] = smallest and largest key of each chunk.
__global__ void range_kernel(const float* master, Chunks chunks, QuantRange* ranges) {
  __shared__ std::int32_t shared[2 * kLanes / kWarpThreads];
  for (std::int64_t chunk = blockIdx.x; chunk < chunks.count; chunk += gridDim.x) {
    const Chunks::Range at = chunks.range(chunk);
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
    if (threadIdx.x == 0) ranges[chunk] = range;
  }
}

/// sums[chunk] = magnitude_sum of each chunk, a thread per lane of its definition. The threshold is
/// that of the chunk's group, or kNoThreshold where `groups` is null.
__global__ void magnitude_kernel(const float* master, Chunks chunks, const QuantGroup* groups,
                                 MagnitudeSum* sums) {
  __shared__ double lane_sums[kLanes];
  __shared__ int counts[kLanes / kWarpThreads];
  for (std::int64_t chunk = blockIdx.x; chunk < chunks.count; chunk += gridDim.x) {
    const Chunks::Range at = chunks.range(chunk);
    const float threshold = groups == nullptr ? kNoThreshold : groups[at.group].threshold;
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
    if (threadIdx.x == 0) sums[chunk] = {lane_sums[0], count};
  }
}

/// What group_kernel finds: all of a group, or only the threshold of ternary weights.
enum class Find { threshold, group };

/// groups[g] from the ranges and sums of its chunks; `sums` is read for ternary and binary only.
__global__ void group_kernel(QuantSpec spec, Find find, Chunks chunks, const QuantRange* ranges,
                             const MagnitudeSum* sums, QuantGroup* groups) {
  __shared__ std::int32_t shared[2 * kLanes / kWarpThreads];
  for (std::int64_t group = blockIdx.x; group < spec.groups; group += gridDim.x) {
    const std::int64_t first = group * chunks.chunks_per_group;
    QuantRange range;
    for (std::int64_t i = threadIdx.x; i < chunks.chunks_per_group; i += kLanes) {
      range.min_key = min(range.min_key, ranges[first + i].min_key);
      range.max_key = max(range.max_key, ranges[first + i].max_key);
    }
    range = block_range(range, shared);
    if (threadIdx.x != 0) continue;
    if (!is_sign_quantized(spec.bits)) {
      groups[group] = uniform_group(spec.bits, spec.q_type, range);
      continue;
    }
    MagnitudeSum total;
    for (std::int64_t i = 0; i < chunks.chunks_per_group; ++i) {
      total.sum += sums[first + i].sum;
      total.count += sums[first + i].count;
    }
    if (find == Find::threshold) {
      groups[group].threshold = ternary_threshold(total);
    } else {
      const float threshold = spec.bits == 1 ? 0.0f : groups[group].threshold;
      groups[group] = sign_group(range, threshold, total);
    }
  }
}

/// The working weight of master value `g` before it is rounded to the compute dtype.
struct Quantize {
  QuantSpec spec;
  CodeLimits limits;
  float mix;

  __device__ float operator()(float g, const QuantGroup& group, float offset) const {
    const float code =
        is_sign_quantized(spec.bits) ? sign_code(g, group) : uniform_code(g, group, limits, offset);
    return blend(mix, g, dequantize(code, group));
  }
};

template <typename T>
__device__ void quantize_nearest(const Quantize& quantize, const QuantGroup& group,
                                 const Chunks::Range& at, const float* master, T* working) {
  for (std::int64_t i = at.begin / 8 * 8 + 8 * threadIdx.x; i < at.end; i += 8 * kLanes) {
    Eight values = load_eight(master, i, at.begin, at.end);
#pragma unroll
    for (int j = 0; j < 8; ++j) values.value[j] = quantize(values.value[j], group, 0.0f);
    store_eight(working, i, at.begin, at.end, values);
  }
}

/// A thread takes the eight elements of a stochastic block that share one Philox result. Blocks are
/// counted in the parameter, of which the tensor may be a part.
template <typename T>
__device__ void quantize_stochastic(const Quantize& quantize, const StochasticKey& key,
                                    const QuantGroup& group, const Chunks::Range& at,
                                    const float* master, T* working) {
  const auto lane = static_cast<std::uint32_t>(threadIdx.x % 16);
  const std::int64_t first = key.first_element;
  for (std::int64_t block = (first + at.begin) / kStochasticBlock + threadIdx.x / 16;
       block * kStochasticBlock < first + at.end; block += kLanes / 16) {
    const PhiloxBlock random =
        philox(stochastic_counter(key, block, lane), stochastic_philox_key(key));
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const std::int64_t element = block * kStochasticBlock + 16 * j + lane - first;
      if (element < at.begin || element >= at.end) continue;
      const float offset = stochastic_offset((random.word[j / 2] >> (16 * (j % 2))) & 0xffffu);
      working[element] = narrow<T>(quantize(master[element], group, offset));
    }
  }
}

/// May run in place: every element is read and written by one thread.
template <typename T>
__global__ void quantize_kernel(Quantize quantize, StochasticKey key, Chunks chunks,
                                const QuantGroup* groups, const float* master, T* working) {
  for (std::int64_t chunk = blockIdx.x; chunk < chunks.count; chunk += gridDim.x) {
    const Chunks::Range at = chunks.range(chunk);
    const QuantGroup group = groups[at.group];
    if (quantize.spec.rounding == Rounding::stochastic) {
      quantize_stochastic(quantize, key, group, at, master, working);
    } else {
      quantize_nearest(quantize, group, at, master, working);
    }
  }
}

/// Blocks for `count` pieces of work, which they take in turns.
unsigned blocks_of(std::int64_t count) {
  constexpr std::int64_t kMostBlocks = std::int64_t{1} << 20;
  return static_cast<unsigned>(count < kMostBlocks ? count : kMostBlocks);
}

/// Scratch memory: sums first, which need the widest alignment.
struct Parts {
  MagnitudeSum* sums;
  QuantRange* ranges;
  QuantGroup* groups;

  Parts(void* memory, std::int64_t chunks) {
    sums = static_cast<MagnitudeSum*>(memory);
    ranges = reinterpret_cast<QuantRange*>(sums + chunks);
    groups = reinterpret_cast<QuantGroup*>(ranges + chunks);
  }
  static std::size_t bytes(std::int64_t chunks, std::int64_t groups) {
    return static_cast<std::size_t>(chunks) * (sizeof(MagnitudeSum) + sizeof(QuantRange)) +
           static_cast<std::size_t>(groups) * sizeof(QuantGroup);
  }
};

void find_groups(const QuantSpec& spec, const float* master, const Chunks& chunks,
                 const Parts& parts, cudaStream_t stream) {
  const unsigned blocks = blocks_of(chunks.count), group_blocks = blocks_of(spec.groups);
  const auto find = [&](Find what) {
    group_kernel<<<group_blocks, kLanes, 0, stream>>>(spec, what, chunks, parts.ranges, parts.sums,
                                                      parts.groups);
    check_launch("fake_quantize");
  };
  const auto sum = [&](const QuantGroup* groups) {
    magnitude_kernel<<<blocks, kLanes, 0, stream>>>(master, chunks, groups, parts.sums);
    check_launch("fake_quantize");
  };
  range_kernel<<<blocks, kLanes, 0, stream>>>(master, chunks, parts.ranges);
  check_launch("fake_quantize");
  if (is_sign_quantized(spec.bits)) sum(nullptr);
  if (spec.bits == 2) {
    find(Find::threshold);
    sum(parts.groups);
  }
  find(Find::group);
}

}  // namespace

void CudaBackend::fake_quantize(const QuantSpec& spec, const StochasticKey& key, float mix,
                                const Tensor& master, const Tensor& working) {
  check_fake_quantize(spec, master, working);
  if (spec.bits >= kCastBits) return cast(master, working);
  const std::int64_t numel = master.numel();
  if (numel == 0) return;
  Chunks chunks{};
  chunks.group_numel = numel / spec.groups;
  chunks.chunks_per_group = (chunks.group_numel + kQuantSumChunk - 1) / kQuantSumChunk;
  chunks.count = spec.groups * chunks.chunks_per_group;
  const Parts parts(scratch(Parts::bytes(chunks.count, spec.groups)), chunks.count);
  const cudaStream_t stream = this->stream();
  const auto* const source = device_data<const float>(master);
  find_groups(spec, source, chunks, parts, stream);
  const Quantize quantize{spec, CodeLimits(spec.bits, spec.q_type), mix};
  visit_dtype(working.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    quantize_kernel<T><<<blocks_of(chunks.count), kLanes, 0, stream>>>(
        quantize, key, chunks, parts.groups, source, device_data<T>(working));
  });
  check_launch("fake_quantize");
}

}  // namespace bitfall
