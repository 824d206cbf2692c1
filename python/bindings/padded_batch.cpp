#include "python/bindings/padded_batch.h"

#include <algorithm>

#include "core/error.h"

namespace bitfall::python {
namespace {

/// Ids outside of 32 bits become -1, which every table refuses.
std::int32_t narrow(std::int64_t id) {
  return id >= 0 && id <= INT32_MAX ? static_cast<std::int32_t>(id) : -1;
}

/// Throws UnsupportedError unless all values are 0 or 1.
void check_mask(std::span<const std::int64_t> mask) {
  for (const std::int64_t value : mask) {
    check<UnsupportedError>(value == 0 || value == 1,
                            "attention_mask has other values than 0 and 1");
  }
}

}  // namespace

PackedBatch pack(const PaddedBatch& padded, PaddingTokens padding) {
  const std::span<const std::int64_t> mask = padded.attention_mask;
  const std::span<const std::int64_t> types = padded.token_type_ids;
  const std::span<const std::int64_t> positions = padded.position_ids;
  check_mask(mask);
  PackedBatch packed;
  Batch& batch = packed.batch;
  /// Appends the tokens of row b whose mask is `wanted`; returns how many.
  const auto append = [&](std::int64_t b, std::int64_t wanted) {
    std::int32_t count = 0;
    for (std::int64_t column = 0; column < padded.length; ++column) {
      const auto index = static_cast<std::size_t>(b * padded.length + column);
      if ((mask.empty() ? 1 : mask[index]) != wanted) continue;
      ++count;
      packed.rows.push_back(static_cast<std::int32_t>(index));
      batch.input_ids.push_back(narrow(padded.input_ids[index]));
      if (!types.empty()) batch.token_type_ids.push_back(narrow(types[index]));
      batch.position_ids.push_back(narrow(positions.empty() ? column : positions[index]));
    }
    return count;
  };
  batch.sequence_starts.push_back(0);
  for (std::int64_t b = 0; b < padded.num_sequences; ++b) {
    const std::int32_t real = append(b, 1);
    check<UnsupportedError>(real > 0, "a row of attention_mask is all zeros");
    if (padding == PaddingTokens::computed) {
      append(b, 0);
      batch.key_lengths.push_back(real);
    }
    batch.sequence_starts.push_back(static_cast<std::int32_t>(packed.rows.size()));
    batch.sample_keys.push_back(static_cast<std::int32_t>(b));
  }
  const bool has_padding = std::find(mask.begin(), mask.end(), 0) != mask.end();
  if (!has_padding) batch.key_lengths.clear();
  return packed;
}

}  // namespace bitfall::python
