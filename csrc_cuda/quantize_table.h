// QuantizeTable: the ranges of Backend::fake_quantize and adam_update in device memory, and how
// they fall into work for blocks, so that one launch serves them all.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "core/backend.h"
#include "quantizer/quant_math.h"

namespace bitfall {

/// Elements that a block holds at once.
inline constexpr std::int64_t kTileElements = 8192;

/// What a block does with a tile.
enum class TileTask {
  read,    ///< finds its smallest and largest weight
  write,   ///< quantizes it, once those of the whole group are known
  do_both  ///< and holds it in between
};

/// Whether masters are updated before they are quantized.
enum class Masters { keep, update };

/// What happens to one range.
struct TileRange {
  FakeQuantizeRange quantize;
  Masters masters = Masters::keep;
  AdamStep step = {};  ///< if they are updated

  bool operator==(const TileRange&) const = default;
};

/// One range, and how much lies in those before it.
///
/// A group falls into tiles, which begin at multiples of `alignment` elements from `origin`.
/// Blocks take items in turn. Of a group of few tiles, each tile is an item. In a larger one, each
/// is read in one item and written in a later one, for which it comes out of the L2 cache.
struct QuantizeEntry {
  FakeQuantizeRange range;
  Masters masters;
  AdamStep step;
  std::int64_t groups, first_group;  ///< a range that is only cast is one group
  std::int64_t group_numel;
  std::int64_t origin;     ///< element 0 of the parameter if random numbers are needed, else 0
  std::int64_t alignment;  ///< kStochasticBlock or, for 16-byte accesses, 8
  std::int64_t tiles_per_group, first_item;
  TileTask task;       ///< do_both, or read if there are items of both kinds
  QuantChunks chunks;  ///< of the sums for ternary and binary groups
  std::int64_t first_chunk;
};

class QuantizeTable {
 public:
  /// Makes this the table of `ranges`; uploads nothing if it is that already. `processors`:
  /// of the GPU. Groups of more tiles than that are read and written in different items: no more
  /// blocks wait for each other than one per processor, for which there is room even if others use
  /// the GPU too, and the rest reads and writes meanwhile.
  void set(Backend& backend, std::span<const TileRange> ranges, int processors);

  const QuantizeEntry* entries() const {  ///< in device memory
    return static_cast<const QuantizeEntry*>(buffer_.memory().get());
  }
  int count() const { return count_; }
  std::int64_t groups() const { return groups_; }  ///< of all entries
  std::int64_t items() const { return items_; }
  std::int64_t chunks() const { return chunks_; }  ///< of the ternary and binary entries
  bool has_ternary() const;
  int processors() const { return processors_; }

 private:
  /// The entry that follows what was counted so far.
  QuantizeEntry next_entry(const TileRange& range) const;

  std::vector<TileRange> ranges_;
  int processors_ = 0;
  Buffer buffer_;
  int count_ = 0;
  std::int64_t groups_ = 0, items_ = 0, chunks_ = 0;
};

}  // namespace bitfall
