// EncoderConfig: the sizes of a BERT encoder, as its Hugging Face config.json gives them.
#pragma once

#include <cstdint>
#include <string>

#include "core/backend.h"

namespace bitfall {

/// Field names and defaults are those of transformers.BertConfig.
struct EncoderConfig {
  std::int64_t vocab_size = 30522;
  std::int64_t hidden_size = 768;
  std::int64_t num_hidden_layers = 12;
  std::int64_t num_attention_heads = 12;
  std::int64_t intermediate_size = 3072;
  std::int64_t max_position_embeddings = 512;
  std::int64_t type_vocab_size = 2;
  Activation hidden_act = Activation::gelu;
  float hidden_dropout_prob = 0.1f;
  float attention_probs_dropout_prob = 0.1f;
  float classifier_dropout = 0.1f;  ///< hidden_dropout_prob where the file has null or nothing
  float layer_norm_eps = 1e-12f;
  float initializer_range = 0.02f;  ///< standard deviation of weights that no file provides

  std::int64_t head_size() const { return hidden_size / num_attention_heads; }
};

/// Reads the text of a config.json; `source` names the file in messages.
///
/// Throws ModelFileError that names the key, what was seen and what was expected for: malformed
/// JSON, another model_type than "bert", sizes out of range, an unknown hidden_act, and variants
/// of BERT that the encoder does not have (relative positions, decoders, cross-attention).
EncoderConfig parse_encoder_config(const std::string& text, const std::string& source);

}  // namespace bitfall
