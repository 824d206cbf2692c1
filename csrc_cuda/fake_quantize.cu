// Fake quantization in one pass over memory, bit for bit what the CPU writes: both take every
// formula from quantizer/quant_math.h. Compiled without fused multiply-add (see CMakeLists.txt).
//
// Blocks stay on the GPU and take items (see QuantizeTable) in their order. A block that has read a
// tile adds its smallest and largest weight to its group's; one that is to write waits until all
// tiles of the group have been read. That ends: items of larger groups wait for earlier ones that
// wait for nothing, and all tiles of a smaller group are held at the same time.
#include <algorithm>

#include "core/operation_checks.h"
#include "csrc_cuda/cuda_backend.h"
#include "csrc_cuda/element.cuh"
#include "csrc_cuda/quant_range.cuh"
#include "csrc_cuda/ranges.cuh"
#include "csrc_cuda/sign_groups.h"

namespace bitfall {
namespace {

constexpr int kRowElements = 8 * kQuantThreads;
constexpr int kTileRows = kTileElements / kRowElements;

/// What is known of a group; zeros: nothing yet.
struct alignas(16) GroupState {
  std::uint32_t largest;   ///< max_key, shifted so that 0 is the lowest
  std::uint32_t smallest;  ///< the same of ~min_key
  std::uint32_t arrived;   ///< tiles
};

/// A QuantizeTable as the kernel sees it.
struct Work {
  const QuantizeEntry* entries;
  int count;
  std::uint64_t item_count;
  unsigned long long* taken;      ///< items
  GroupState* states;             ///< per group
  const QuantGroup* sign_groups;  ///< per group, of ternary and binary ranges
};

/// Of the threads of a block. Dynamic memory, since the emulator has several blocks in flight.
struct BlockMemory {
  std::uint16_t random[kQuantThreads / 16][kStochasticBlock];
  WarpRanges warp_ranges;
  QuantRange group_range;
  std::uint64_t item[2];
};

/// Where an item's tile lies in the buffers.
struct Item {
  const QuantizeEntry& entry;
  TileTask task;
  std::int64_t group;  ///< of those of all ranges
  std::int64_t first;  ///< less than entry.alignment elements before the tile's begin
  int begin, end;      ///< counted from there; the end is before the begin if the tile is empty

  __device__ Item(const Work& work, std::int64_t number)
      : entry(entry_of<&QuantizeEntry::first_item>(work.entries, work.count, number)),
        task(entry.task) {
    const std::int64_t of_range = number - entry.first_item;
    const std::int64_t tile = of_range % entry.tiles_per_group;
    std::int64_t turn = of_range / entry.tiles_per_group;
    if (task != TileTask::do_both) {
      // A group is read before the one in front of it is written, so that nobody need wait long.
      const bool read = turn == 0 || (turn % 2 == 1 && turn < 2 * entry.groups - 1);
      task = read ? TileTask::read : TileTask::write;
      turn = read ? (turn + 1) / 2 : (turn - 1) / 2;
    }
    group = entry.first_group + turn;
    const std::int64_t group_begin = entry.range.begin + turn * entry.group_numel;
    const std::int64_t before = (group_begin - entry.origin) % entry.alignment;
    const std::int64_t of_group = tile * kTileElements - before;
    first = group_begin + of_group;
    begin = static_cast<int>(max(std::int64_t{0}, -of_group));
    end = static_cast<int>(min(kTileElements, entry.group_numel - of_group));
  }
  __device__ bool whole() const { return begin == 0 && end == kTileElements; }
};

/// A tile in registers: of each row, a thread has eight neighbours.
struct Tile {
  Eight rows[kTileRows];

  /// First of this thread's eight in a row, counted from item.first.
  __device__ static int place(int row) {
    return row * kRowElements + 8 * static_cast<int>(threadIdx.x);
  }

  __device__ Tile(const Item& item, const float* master) {
    master += item.first;
    const bool whole = item.whole() && aligned(master);
#pragma unroll
    for (int row = 0; row < kTileRows; ++row) {
      if (whole) {
        rows[row] = load_packs(master + place(row));
      } else if (row * kRowElements < item.end) {
        rows[row] = load_eight(master, place(row), item.begin, item.end);
      }
    }
  }

  template <typename T>
  __device__ void store(const Item& item, T* working) const {
    working += item.first;
    const bool whole = item.whole() && aligned(working);
#pragma unroll
    for (int row = 0; row < kTileRows; ++row) {
      if (whole) {
        store_packs(working + place(row), rows[row]);
      } else if (row * kRowElements < item.end) {
        store_eight(working, place(row), item.begin, item.end, rows[row]);
      }
    }
  }

  /// Of the weights that this thread has.
  __device__ QuantRange range(const Item& item) const {
    const bool whole = item.whole();
    QuantRange result;
#pragma unroll
    for (int row = 0; row < kTileRows; ++row) {
      const int i = place(row);
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        if (whole || (i + j >= item.begin && i + j < item.end))
          widen_range(result, rows[row].value[j]);
      }
    }
    return result;
  }
};

/// Adds a tile's range to what is known of its group.
__device__ void publish(GroupState& state, const QuantRange& range) {
  if (threadIdx.x != 0) return;
  const std::uint32_t lowest = 0x80000000u;
  atomicMax(&state.largest, static_cast<std::uint32_t>(range.max_key) ^ lowest);
  atomicMax(&state.smallest, ~static_cast<std::uint32_t>(range.min_key) ^ lowest);
  __threadfence();  // who sees the arrival sees the range
  atomicAdd(&state.arrived, 1u);
}

/// The range of a group once all its `tiles` have arrived. All threads must call it.
__device__ QuantRange await_range(const GroupState& state, std::int64_t tiles, QuantRange& shared) {
  if (threadIdx.x == 0) {
    const volatile GroupState& seen = state;
    while (seen.arrived < tiles) __nanosleep(40);
    __threadfence();
    const std::uint32_t lowest = 0x80000000u;
    shared.max_key = static_cast<std::int32_t>(seen.largest ^ lowest);
    shared.min_key = static_cast<std::int32_t>(~(seen.smallest ^ lowest));
  }
  __syncthreads();
  return shared;
}

/// What the group of a tile shares, if the item is to write it. All threads must call it.
__device__ QuantGroup find_group(const Work& work, const Item& item, const Tile& tile,
                                 BlockMemory& shared) {
  const QuantSpec& spec = item.entry.range.spec;
  if (spec.bits >= kCastBits) return {};
  if (is_sign_quantized(spec.bits)) return work.sign_groups[item.group];
  const std::int64_t tiles = item.entry.tiles_per_group;
  QuantRange range;
  if (item.task != TileTask::write) {
    range = block_range(tile.range(item), shared.warp_ranges);
    if (tiles > 1) publish(work.states[item.group], range);
  }
  if (item.task == TileTask::read) return {};
  if (tiles > 1) range = await_range(work.states[item.group], tiles, shared.group_range);
  return uniform_group(spec.bits, spec.q_type, range);
}

/// Offsets of this thread's eight in a row. Sixteen threads take a stochastic block, whose
/// Philox results they exchange: each draws the numbers of eight elements 16 apart. Blocks are
/// counted in the parameter, of which the range may be a part.
__device__ Eight stochastic_offsets(const Item& item, int row, BlockMemory& shared) {
  const auto lane = static_cast<std::uint32_t>(threadIdx.x % 16);
  std::uint16_t* const numbers = shared.random[threadIdx.x / 16];
  const StochasticKey& key = item.entry.range.key;
  const std::int64_t block = (item.first - item.entry.origin + Tile::place(row)) / kStochasticBlock;
  const PhiloxBlock random =
      philox(stochastic_counter(key, block, lane), stochastic_philox_key(key));
  __syncwarp();  // the last readers of `numbers` are done
#pragma unroll
  for (int j = 0; j < 8; ++j)
    numbers[16 * j + lane] =
        static_cast<std::uint16_t>((random.word[j / 2] >> (16 * (j % 2))) & 0xffffu);
  __syncwarp();
  Eight offsets;
#pragma unroll
  for (int j = 0; j < 8; ++j) offsets.value[j] = stochastic_offset(numbers[8 * lane + j]);
  return offsets;
}

/// Weights become what they are before they are rounded to the compute dtype.
__device__ void quantize(Tile& tile, const Item& item, const QuantGroup& group,
                         BlockMemory& shared) {
  const QuantSpec& spec = item.entry.range.spec;
  const float mix = item.entry.range.mix;
  const CodeLimits limits(spec.bits, spec.q_type);
#pragma unroll
  for (int row = 0; row < kTileRows; ++row) {
    if (row * kRowElements >= item.end) continue;
    float(&weights)[8] = tile.rows[row].value;
    if (is_sign_quantized(spec.bits)) {
#pragma unroll
      for (float& g : weights) g = blend(mix, g, dequantize(sign_code(g, group), group));
      continue;
    }
    Eight offsets{};
    if (spec.rounding == Rounding::stochastic) offsets = stochastic_offsets(item, row, shared);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const float g = weights[j];
      weights[j] =
          blend(mix, g, dequantize(uniform_code(g, group, limits, offsets.value[j]), group));
    }
  }
}

/// May run in place: every element is read and written by one thread.
template <typename T>
__global__ __launch_bounds__(kQuantThreads, 4) void quantize_kernel(Work work, const float* master,
                                                                    T* working) {
  extern __shared__ __align__(16) BlockMemory block_memory[];
  BlockMemory& shared = block_memory[0];
  const auto take = [&] { return threadIdx.x == 0 ? atomicAdd(work.taken, 1ull) : 0; };
  std::uint64_t next = take();
  for (int slot = 0;; slot ^= 1) {  // the other one may still be read
    if (threadIdx.x == 0) shared.item[slot] = next;
    __syncthreads();
    if (shared.item[slot] >= work.item_count) return;
    const Item item(work, static_cast<std::int64_t>(shared.item[slot]));
    Tile tile(item, master);
    const QuantGroup group = find_group(work, item, tile, shared);
    next = take();  // not before: nobody may have to wait for an item that waits
    if (item.task == TileTask::read) continue;
    if (item.entry.range.spec.bits < kCastBits) quantize(tile, item, group, shared);
    tile.store(item, working);
  }
}

int processors_of(int device_index) {
  int count = 0;
  cuda_check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device_index),
             "cudaDeviceGetAttribute");
  return count;
}

/// Blocks of the kernel that a processor has at once.
template <typename T>
int blocks_per_processor() {
  int count = 0;
  cuda_check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&count, quantize_kernel<T>,
                                                           kQuantThreads, sizeof(BlockMemory)),
             "cudaOccupancyMaxActiveBlocksPerMultiprocessor");
  return count;
}

}  // namespace

void CudaBackend::fake_quantize(std::span<const FakeQuantizeRange> ranges, const Tensor& master,
                                const Tensor& working) {
  check_fake_quantize(ranges, master, working);
  const cudaStream_t stream = this->stream();
  const auto* const source = device_data<const float>(master);
  visit_dtype(working.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const std::int64_t processors = processors_of(device_index_);
    QuantizeTable& table = *quantize_table_;
    // No more blocks wait for each other than one per processor: there is room for these even if
    // others use the GPU too, and the rest reads and writes meanwhile.
    table.set(*this, ranges, processors);
    if (table.items() == 0) return;
    const auto state_bytes = static_cast<std::size_t>(table.groups()) * sizeof(GroupState);
    auto* const zeros = static_cast<GroupState*>(
        scratch(sizeof(GroupState) + state_bytes + sign_groups_scratch_bytes(table)));
    cuda_check(cudaMemsetAsync(zeros, 0, sizeof(GroupState) + state_bytes, stream),
               "cudaMemsetAsync");
    Work work{.entries = table.entries(),
              .count = table.count(),
              .item_count = static_cast<std::uint64_t>(table.items()),
              .taken = reinterpret_cast<unsigned long long*>(zeros),
              .states = zeros + 1,
              .sign_groups = nullptr};
    if (table.chunks() > 0)
      work.sign_groups = find_sign_groups(table, source, work.states + table.groups(), stream);
    const auto grid =
        static_cast<unsigned>(std::min(processors * blocks_per_processor<T>(), table.items()));
    quantize_kernel<T><<<grid, kQuantThreads, sizeof(BlockMemory), stream>>>(
        work, source, device_data<T>(working));
    check_launch("fake_quantize");
  });
}

}  // namespace bitfall
