#include "csrc_cuda/quantize_table.h"

#include <algorithm>

namespace bitfall {

void QuantizeTable::set(Backend& backend, std::span<const FakeQuantizeRange> ranges) {
  if (std::equal(ranges.begin(), ranges.end(), ranges_.begin(), ranges_.end())) return;
  ranges_.clear();  // nobody's table until it is complete
  chunks_ = groups_ = 0;
  std::vector<QuantizeEntry> entries;
  for (const FakeQuantizeRange& range : ranges) {
    if (range.numel == 0) continue;
    entries.push_back({range, {range.numel, range.spec.groups}, chunks_, groups_});
    chunks_ += entries.back().chunks.count;
    groups_ += range.spec.groups;
  }
  count_ = static_cast<int>(entries.size());
  const std::size_t bytes = entries.size() * sizeof(QuantizeEntry);
  if (buffer_.bytes() < bytes) buffer_ = backend.allocate(bytes);
  const Shape shape{static_cast<std::int64_t>(bytes)};
  backend.copy({entries.data(), DType::s8, shape, Device::cpu}, buffer_.view(DType::s8, shape));
  ranges_.assign(ranges.begin(), ranges.end());
}

bool QuantizeTable::has_bits(int least, int most) const {
  return std::any_of(ranges_.begin(), ranges_.end(), [&](const FakeQuantizeRange& range) {
    return least <= range.spec.bits && range.spec.bits <= most;
  });
}

}  // namespace bitfall
