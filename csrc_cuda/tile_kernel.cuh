// The kernel behind fake_quantize and adam_update: one pass over memory, bit for bit what the CPU
// writes, since both take every formula from quantizer/quant_math.h. To be compiled without fused
// multiply-add (see CMakeLists.txt).
//
// Blocks stay on the GPU and take items (see QuantizeTable) in their order. A block that has read a
// tile adds its smallest and largest weight to its group's; one that is to write waits until all
// tiles of the group have been read, and loads what another one has read only then, for that may
// have updated it. The wait ends: items of larger groups wait for earlier ones that wait for
// nothing, and all tiles of a smaller group are held at the same time.
#pragma once

#include <algorithm>
#include <type_traits>

#include "csrc_cuda/divider.cuh"
#include "csrc_cuda/sign_groups.h"
#include "csrc_cuda/tiles.cuh"

namespace bitfall {

/// Adds a tile's range to what is known of its group.
__device__ inline void publish(GroupState& state, const QuantRange& range) {
  if (threadIdx.x != 0) return;
  const std::uint32_t lowest = 0x80000000u;
  atomicMax(&state.largest, static_cast<std::uint32_t>(range.max_key) ^ lowest);
  atomicMax(&state.smallest, ~static_cast<std::uint32_t>(range.min_key) ^ lowest);
  __threadfence();  // who sees the arrival sees the range
  atomicAdd(&state.arrived, 1u);
}

/// The range of an item's group once all tiles have arrived, and with it what those who read them
/// have written. All threads must call it.
__device__ inline QuantRange await_range(const TileWork& work, const Item& item,
                                         BlockMemory& shared) {
  if (threadIdx.x == 0) {
    const volatile GroupState& seen = work.states[item.group];
    while (seen.arrived < item.entry.tiles_per_group) __nanosleep(40);
    __threadfence();
    const std::uint32_t lowest = 0x80000000u;
    shared.max_key = static_cast<std::int32_t>(seen.largest ^ lowest);
    shared.min_key = static_cast<std::int32_t>(~(seen.smallest ^ lowest));
  }
  __syncthreads();
  return {shared.min_key, shared.max_key};
}

/// What the group of a tile shares, if the item is to write it; `range`: of the group, if the item
/// does nothing else. All threads must call it.
__device__ inline QuantGroup find_group(const TileWork& work, const Item& item, const Tile& tile,
                                        QuantRange range, BlockMemory& shared) {
  const QuantSpec& spec = item.entry.range.spec;
  if (spec.bits >= kCastBits) return {};
  if (is_sign_quantized(spec.bits)) return work.sign_groups[item.group];
  if (item.task != TileTask::write) {
    const bool shares = item.entry.tiles_per_group > 1;
    range = block_range(range_of(item, tile), shared.warp_ranges);
    if (shares) publish(work.states[item.group], range);
    if (item.task == TileTask::read) return {};
    if (shares) range = await_range(work, item, shared);
  }
  return uniform_group(spec.bits, spec.q_type, range);
}

/// Offsets of this thread's eight in a row. Sixteen threads take a stochastic block, whose
/// Philox results they exchange: each draws the numbers of eight elements 16 apart. Blocks are
/// counted in the parameter, of which the range may be a part.
__device__ inline Eight stochastic_offsets(const Item& item, int row, BlockMemory& shared) {
  const auto lane = static_cast<std::uint32_t>(threadIdx.x % 16);
  std::uint16_t* const numbers = shared.random[threadIdx.x / 16];
  const StochasticKey& key = item.entry.range.key;
  const std::int64_t block = (item.first - item.entry.origin + place(row)) / kStochasticBlock;
  const PhiloxBlock random =
      philox(stochastic_counter(key, block, lane), stochastic_philox_key(key));
  __syncwarp();  // the last readers of `numbers` are done
#pragma unroll
  for (int j = 0; j < 8; ++j)
    numbers[16 * j + lane] = static_cast<std::uint16_t>(random_half(random, j));
  __syncwarp();
  Eight offsets;
#pragma unroll
  for (int j = 0; j < 8; ++j) offsets.value[j] = stochastic_offset(numbers[8 * lane + j]);
  return offsets;
}

/// Weights become what they are before they are rounded to the compute dtype.
__device__ inline void quantize(Tile& tile, const Item& item, const QuantGroup& group,
                                BlockMemory& shared) {
  const QuantSpec& spec = item.entry.range.spec;
  const float mix = item.entry.range.mix;
  const CodeLimits limits(spec.bits, spec.q_type);
  const Divider by_scale(group.scale);
  for_each_row(item, [&](int row) {
    float(&weights)[8] = tile.rows[row].value;
    if (is_sign_quantized(spec.bits)) {
#pragma unroll
      for (float& g : weights) g = blend(mix, g, dequantize(sign_code(g, group), group));
      return;
    }
    Eight offsets{};
    if (spec.rounding == Rounding::stochastic) offsets = stochastic_offsets(item, row, shared);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const float g = weights[j];
      const float code = code_of_quotient(by_scale(g), group, limits, offsets.value[j]);
      weights[j] = blend(mix, g, dequantize(code, group));
    }
  });
}

/// `source.load(item, tile)` brings the masters of a tile. `working` is null if there is nothing to
/// write but what the source writes. May run in place: every element is read and written by one
/// thread.
template <typename T, typename Source>
__global__ __launch_bounds__(kQuantThreads,
                             Source::kBlocksPerProcessor) void tile_kernel(TileWork work,
                                                                           Source source,
                                                                           T* working) {
  static_assert(std::is_trivially_default_constructible_v<BlockMemory>);
  extern __shared__ __align__(16) BlockMemory block_memory[];
  BlockMemory& shared = block_memory[0];
  const auto take = [&] { return threadIdx.x == 0 ? atomicAdd(work.taken, 1ull) : 0; };
  std::uint64_t next = take();
  for (int slot = 0;; slot ^= 1) {  // the other one may still be read
    if (threadIdx.x == 0) shared.item[slot] = next;
    __syncthreads();
    if (shared.item[slot] >= work.item_count) return;
    const Item item(work, static_cast<std::int64_t>(shared.item[slot]));
    QuantRange range;
    if (item.task == TileTask::write) range = await_range(work, item, shared);
    Tile tile;
    source.load(item, tile);
    const QuantGroup group = find_group(work, item, tile, range, shared);
    next = take();  // not before: nobody may have to wait for an item that waits
    if (item.task == TileTask::read || working == nullptr) continue;
    if (item.entry.range.spec.bits < kCastBits) quantize(tile, item, group, shared);
    store_tile(item, tile, working);
  }
}

/// Bytes of scratch memory for run_tiles.
inline std::size_t tile_scratch_bytes(const QuantizeTable& table) {
  return static_cast<std::size_t>(table.groups() + 1) * sizeof(GroupState) +
         sign_groups_scratch_bytes(table);
}

/// Does the work of a table that has some. Throws BackendError that names `operation`.
template <typename T, typename Source>
void run_tiles(const char* operation, const QuantizeTable& table, const Source& source, T* working,
               void* scratch, cudaStream_t stream) {
  auto* const zeros = static_cast<GroupState*>(scratch);
  const std::int64_t groups = table.groups();
  cuda_check(
      cudaMemsetAsync(zeros, 0, static_cast<std::size_t>(groups + 1) * sizeof(GroupState), stream),
      "cudaMemsetAsync");
  TileWork work{.entries = table.entries(),
                .count = table.count(),
                .item_count = static_cast<std::uint64_t>(table.items()),
                .taken = reinterpret_cast<unsigned long long*>(zeros),
                .states = zeros + 1,
                .sign_groups = nullptr};
  if (table.chunks() > 0)
    work.sign_groups = find_sign_groups(table, source.master, work.states + groups, stream);
  int blocks = 0;  // of a processor at once
  cuda_check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, tile_kernel<T, Source>,
                                                           kQuantThreads, sizeof(BlockMemory)),
             "cudaOccupancyMaxActiveBlocksPerMultiprocessor");
  const std::int64_t grid = std::min(std::int64_t{blocks} * table.processors(), table.items());
  tile_kernel<T, Source>
      <<<static_cast<unsigned>(grid), kQuantThreads, sizeof(BlockMemory), stream>>>(work, source,
                                                                                    working);
  check_launch(operation);
}

}  // namespace bitfall
