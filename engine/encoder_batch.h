// EncoderBatch: a Batch on the device, with the indices that the encoder derives from it.
#pragma once

#include "core/model.h"
#include "engine/encoder_config.h"
#include "engine/workspace.h"

namespace bitfall {

/// Throws ShapeError that names the field, the place and what was seen unless `batch` is well
/// formed and its ids fit the tables of `config`. Labels are the head's to check.
void check_batch(const Batch& batch, const EncoderConfig& config);

/// All integers are s32, on the backend's device.
///
/// Tokens may be filled up to a round number with a sequence that nobody reads and that no gradient
/// comes from: the last of the S that attention sees, perhaps of no token.
struct EncoderBatch {
  std::int64_t num_tokens = 0;     ///< T
  std::int64_t num_sequences = 0;  ///< B
  EmbeddingIds ids;                ///< [T] each
  Tensor sequence_starts;          ///< [S+1], S = B or, filled up, B + 1
  Tensor key_lengths;              ///< [S], empty unless given
  Tensor sample_keys;              ///< [S] as row_keys
  Tensor row_keys;                 ///< [T, 2] {sample_key_in_step, position}
  Tensor first_tokens;             ///< [B] row of the first token of each sequence
  Tensor first_token_keys;         ///< [B, 2] {sample_key_in_step, 0}
  Tensor class_labels;             ///< [B]; this and the next two are empty unless given
  Tensor regression_labels;        ///< [B] f32
  Tensor span_positions;           ///< [B, 2]

  /// Takes memory for `batch`, its tokens filled up to a multiple of `token_multiple`.
  void plan(Workspace& workspace, const Batch& batch, std::int64_t token_multiple);
  /// Fills what plan() has placed, for the dropout of optimizer step `step`.
  void upload(Backend& backend, const Batch& batch, std::uint32_t step) const;
};

}  // namespace bitfall
