// The work of a block on weights: items of a QuantizeTable, and their tiles in registers.
#pragma once

#include "csrc_cuda/element.cuh"
#include "csrc_cuda/quant_range.cuh"
#include "csrc_cuda/quantize_table.h"
#include "csrc_cuda/ranges.cuh"

namespace bitfall {

inline constexpr int kRowElements = 8 * kQuantThreads;
inline constexpr int kTileRows = kTileElements / kRowElements;

/// What is known of a group; zeros: nothing yet.
struct alignas(16) GroupState {
  std::uint32_t largest;   ///< max_key, shifted so that 0 is the lowest
  std::uint32_t smallest;  ///< the same of ~min_key
  std::uint32_t arrived;   ///< tiles
};

/// A QuantizeTable as the kernel sees it.
struct TileWork {
  const QuantizeEntry* entries;
  int count;
  std::uint64_t item_count;
  unsigned long long* taken;      ///< items
  GroupState* states;             ///< per group
  const QuantGroup* sign_groups;  ///< per group, of ternary and binary ranges
};

/// Of the threads of a block. Dynamic memory, since the emulator has several blocks in flight; no
/// initializers, which shared memory must not have.
struct BlockMemory {
  std::uint16_t random[kQuantThreads / 16][kStochasticBlock];
  WarpRanges warp_ranges;
  std::int32_t min_key, max_key;  ///< of the group
  std::uint64_t item[2];
};

/// Where an item's tile lies in the buffers.
struct Item {
  const QuantizeEntry& entry;
  TileTask task;
  std::int64_t group;  ///< of those of all ranges
  std::int64_t first;  ///< less than entry.alignment elements before the tile's begin
  int begin, end;      ///< counted from there; the end is before the begin if the tile is empty

  __device__ Item(const TileWork& work, std::int64_t number)
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
};

/// First of this thread's eight in a row, counted from item.first.
__device__ inline int place(int row) {
  return row * kRowElements + 8 * static_cast<int>(threadIdx.x);
}

/// Calls `body(row)` for each row that has elements, unrolled, so that rows stay in registers.
template <typename Body>
__device__ inline void for_each_row(const Item& item, const Body& body) {
#pragma unroll
  for (int row = 0; row < kTileRows; ++row) {
    if (row * kRowElements < item.end) body(row);
  }
}

/// This thread's eight of a row. `data`: the buffer from item.first on.
__device__ inline Eight load_row(const Item& item, const float* data, int row) {
  if (item.whole() && aligned(data)) return load_packs(data + place(row));
  return load_eight(data, place(row), item.begin, item.end);
}

template <typename T>
__device__ inline void store_row(const Item& item, T* data, int row, const Eight& values) {
  if (item.whole() && aligned(data)) {
    store_packs(data + place(row), values);
  } else {
    store_eight(data, place(row), item.begin, item.end, values);
  }
}

__device__ inline void load_tile(const Item& item, const float* master, Tile& tile) {
  master += item.first;
  if (item.whole() && aligned(master)) {  // all loads at once
#pragma unroll
    for (int row = 0; row < kTileRows; ++row) tile.rows[row] = load_packs(master + place(row));
  } else {
    for_each_row(item, [&](int row) { tile.rows[row] = load_row(item, master, row); });
  }
}

template <typename T>
__device__ inline void store_tile(const Item& item, const Tile& tile, T* working) {
  working += item.first;
  for_each_row(item, [&](int row) { store_row(item, working, row, tile.rows[row]); });
}

/// Of the weights that this thread has.
__device__ inline QuantRange range_of(const Item& item, const Tile& tile) {
  const bool whole = item.whole();
  QuantRange result;
  for_each_row(item, [&](int row) {
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const int i = place(row) + j;
      if (whole || (i >= item.begin && i < item.end)) widen_range(result, tile.rows[row].value[j]);
    }
  });
  return result;
}

}  // namespace bitfall
