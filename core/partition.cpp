#include "core/partition.h"

#include <algorithm>

namespace bitfall {
namespace {

/// The allowed border nearest to `place`.
std::int64_t nearest_border(std::int64_t place, std::span<const DivisibleRange> parts) {
  for (const auto& [range, unit] : parts) {
    if (place < range.begin || place >= range.end()) continue;
    const std::int64_t units = (place - range.begin + unit / 2) / unit;
    return std::min(range.begin + units * unit, range.end());
  }
  return place;  // in a gap
}

}  // namespace

FlatRange intersection(const FlatRange& a, const FlatRange& b) {
  const std::int64_t begin = std::clamp(b.begin, a.begin, a.end());
  return {begin, std::max<std::int64_t>(0, std::min(a.end(), b.end()) - begin)};
}

Partition::Partition(std::int64_t numel) : borders_{0, numel} {}

Partition::Partition(std::int64_t numel, int world_size, std::span<const DivisibleRange> parts)
    : borders_{0} {
  for (int rank = 1; rank < world_size; ++rank) {
    // Numbers of elements times ranks stay far below 2^63.
    borders_.push_back(nearest_border(numel * rank / world_size, parts));
  }
  borders_.push_back(numel);
}

FlatRange Partition::slice(int rank) const {
  const std::int64_t begin = borders_.at(static_cast<std::size_t>(rank));
  return {begin, borders_.at(static_cast<std::size_t>(rank) + 1) - begin};
}

std::vector<Partition::Piece> Partition::pieces(const FlatRange& range) const {
  std::vector<Piece> result;
  for (int rank = 0; rank < world_size(); ++rank) {
    const FlatRange piece = intersection(range, slice(rank));
    if (piece.numel > 0) result.push_back({rank, piece});
  }
  return result;
}

}  // namespace bitfall
