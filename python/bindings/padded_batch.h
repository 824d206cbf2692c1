// PaddedBatch: token ids as PyTorch scripts hold them, and their way into a packed Batch.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "core/model.h"

namespace bitfall::python {

/// Arguments of BertModel.forward, row-major [B, S]. An empty span is the default of BertModel:
/// ones for the mask, 0, 1, ... for positions, zeros for token types.
struct PaddedBatch {
  std::int64_t num_sequences = 0;  ///< B
  std::int64_t length = 0;         ///< S
  std::span<const std::int64_t> input_ids, attention_mask, token_type_ids, position_ids;
};

struct PackedBatch {
  Batch batch;
  std::vector<std::int32_t> rows;  ///< [T] where each packed token stands among the B * S
};

/// What becomes of the tokens whose mask is 0: nobody attends to them, but BertModel has an output
/// for them too, which most heads ignore.
enum class PaddingTokens { removed, computed };

/// The real tokens of each row in order, and behind them its padding if that is computed. Sample
/// keys are 0, 1, ...
///
/// Throws UnsupportedError for masks with other values than 0 and 1 and for rows without real
/// tokens.
PackedBatch pack(const PaddedBatch& padded, PaddingTokens padding);

}  // namespace bitfall::python
