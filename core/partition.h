// Partition: which rank owns which part of the flat buffers of a ParameterStore (ZeRO).
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace bitfall {

/// Elements [begin, begin + numel) of the flat buffers.
struct FlatRange {
  std::int64_t begin = 0, numel = 0;

  std::int64_t end() const { return begin + numel; }
  bool operator==(const FlatRange& other) const = default;
};

/// What both have; begins in `a` and has no elements if there is nothing.
FlatRange intersection(const FlatRange& a, const FlatRange& b);

/// A range that may only be cut at multiples of `unit` from its beginning, and at its end.
struct DivisibleRange {
  FlatRange range;
  std::int64_t unit = 1;
};

class Partition {
 public:
  /// Everything belongs to rank 0.
  explicit Partition(std::int64_t numel = 0);
  /// Contiguous slices in rank order, as equal as the `parts` (ascending, disjoint) allow: each
  /// border is the allowed one that is nearest to its place among equal slices. Slices may be
  /// empty.
  Partition(std::int64_t numel, int world_size, std::span<const DivisibleRange> parts);

  int world_size() const { return static_cast<int>(borders_.size()) - 1; }
  FlatRange slice(int rank) const;

  struct Piece {
    int rank = 0;
    FlatRange range;
  };
  /// `range` cut at the borders: its non-empty pieces with their owners, in rank order.
  std::vector<Piece> pieces(const FlatRange& range) const;

 private:
  std::vector<std::int64_t> borders_;  ///< [world_size + 1]
};

}  // namespace bitfall
