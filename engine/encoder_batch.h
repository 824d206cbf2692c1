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
struct EncoderBatch {
  std::int64_t num_tokens = 0;     ///< T
  std::int64_t num_sequences = 0;  ///< B
  EmbeddingIds ids;                ///< [T] each
  Tensor sequence_starts;          ///< [B+1]
  Tensor key_lengths;              ///< [B], empty unless given
  Tensor sample_keys;              ///< [B]
  Tensor row_keys;                 ///< [T, 2] {sample_key, position}
  Tensor first_tokens;             ///< [B] row of the first token of each sequence
  Tensor first_token_keys;         ///< [B, 2] {sample_key, 0}
  Tensor class_labels;             ///< [B]; this and the next two are empty unless given
  Tensor regression_labels;        ///< [B] f32
  Tensor span_positions;           ///< [B, 2]

  /// Takes memory for `batch`.
  void plan(Workspace& workspace, const Batch& batch);
  /// Fills what plan() has placed.
  void upload(Backend& backend, const Batch& batch) const;
};

}  // namespace bitfall
