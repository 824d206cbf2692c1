#include "csrc_cuda/quantize_table.h"

#include <algorithm>

namespace bitfall {

void QuantizeTable::set(Backend& backend, std::span<const TileRange> ranges, int processors) {
  if (processors == processors_ &&
      std::equal(ranges.begin(), ranges.end(), ranges_.begin(), ranges_.end()))
    return;
  ranges_.clear();  // nobody's table until it is complete
  processors_ = processors;
  groups_ = items_ = chunks_ = 0;
  std::vector<QuantizeEntry> entries;
  for (const TileRange& range : ranges) {
    if (range.quantize.numel == 0) continue;
    const QuantizeEntry& entry = entries.emplace_back(next_entry(range));
    groups_ += entry.groups;
    items_ += entry.groups * entry.tiles_per_group * (entry.task == TileTask::do_both ? 1 : 2);
    if (is_sign_quantized(entry.range.spec.bits)) chunks_ += entry.chunks.count;
  }
  count_ = static_cast<int>(entries.size());
  const std::size_t bytes = entries.size() * sizeof(QuantizeEntry);
  if (buffer_.bytes() < bytes) buffer_ = backend.allocate(bytes);
  const Shape shape{static_cast<std::int64_t>(bytes)};
  backend.copy({entries.data(), DType::s8, shape, Device::cpu}, buffer_.view(DType::s8, shape));
  ranges_.assign(ranges.begin(), ranges.end());
}

QuantizeEntry QuantizeTable::next_entry(const TileRange& tiles_of) const {
  const FakeQuantizeRange& range = tiles_of.quantize;
  const int bits = range.spec.bits;
  const bool uniform = !is_sign_quantized(bits) && bits < kCastBits;
  const std::int64_t groups = bits < kCastBits ? range.spec.groups : 1;
  const std::int64_t group_numel = range.numel / groups;
  const bool stochastic = uniform && range.spec.rounding == Rounding::stochastic;
  const std::int64_t origin = stochastic ? range.begin - range.key.first_element : 0;
  const std::int64_t alignment = stochastic ? kStochasticBlock : 8;
  // A tile may have to begin before its group.
  const bool aligned = (range.begin - origin) % alignment == 0 && group_numel % alignment == 0;
  const std::int64_t span = group_numel + (aligned ? 0 : alignment - 1);
  const std::int64_t tiles = (span + kTileElements - 1) / kTileElements;
  return {.range = range,
          .masters = tiles_of.masters,
          .step = tiles_of.step,
          .groups = groups,
          .first_group = groups_,
          .group_numel = group_numel,
          .origin = origin,
          .alignment = alignment,
          .tiles_per_group = tiles,
          .first_item = items_,
          .task = uniform && tiles > processors_ ? TileTask::read : TileTask::do_both,
          .chunks = {range.numel, range.spec.groups},
          .first_chunk = chunks_};
}

bool QuantizeTable::has_ternary() const {
  return std::any_of(ranges_.begin(), ranges_.end(),
                     [](const TileRange& range) { return range.quantize.spec.bits == 2; });
}

}  // namespace bitfall
