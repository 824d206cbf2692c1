// QuantizeTable: the ranges of Backend::fake_quantize in device memory, so that one launch serves
// them all.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "core/backend.h"
#include "quantizer/quant_math.h"

namespace bitfall {

/// One range, and how many chunks and groups lie in those before it.
struct QuantizeEntry {
  FakeQuantizeRange range;
  QuantChunks chunks;
  std::int64_t first_chunk = 0, first_group = 0;
};

class QuantizeTable {
 public:
  /// Makes this the table of `ranges`; uploads nothing if it is that already.
  void set(Backend& backend, std::span<const FakeQuantizeRange> ranges);

  const QuantizeEntry* entries() const {  ///< in device memory
    return static_cast<const QuantizeEntry*>(buffer_.memory().get());
  }
  int count() const { return count_; }
  std::int64_t chunks() const { return chunks_; }  ///< of all entries
  std::int64_t groups() const { return groups_; }
  /// Whether a range has `least` to `most` bits.
  bool has_bits(int least, int most) const;

 private:
  std::vector<FakeQuantizeRange> ranges_;
  Buffer buffer_;
  int count_ = 0;
  std::int64_t chunks_ = 0, groups_ = 0;
};

}  // namespace bitfall
