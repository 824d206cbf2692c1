// A BERT of two small layers with an engine around it: real training in milliseconds.
#pragma once

#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "csrc_cpu/cpu_backend.h"
#include "engine/encoder.h"
#include "engine/engine.h"

namespace bitfall::test {

struct TinyModel {
  int num_layers = 2;
  float dropout = 0.0f;
  std::uint32_t weight_seed = 1;
};

inline EncoderConfig tiny_encoder_config(const TinyModel& model) {
  EncoderConfig config;
  config.vocab_size = 40;
  config.hidden_size = 16;
  config.num_hidden_layers = model.num_layers;
  config.num_attention_heads = 2;
  config.intermediate_size = 32;
  config.max_position_embeddings = 16;
  config.hidden_dropout_prob = model.dropout;
  config.attention_probs_dropout_prob = model.dropout;
  config.classifier_dropout = model.dropout;
  return config;
}

/// Matrices N(0, 0.2), layer norms 1, biases 0.
inline void fill_weights(const ParameterStore& store, std::uint32_t seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal(0.0f, 0.2f);
  for (std::size_t index = 0; index < store.parameters().size(); ++index) {
    const Parameter& parameter = store.parameters()[index];
    const bool is_norm = parameter.name.find("LayerNorm.weight") != std::string::npos;
    auto* values = store.master(index).as<float>();
    for (std::int64_t i = 0; i < parameter.numel; ++i) {
      values[i] = parameter.shape.rank() > 1 ? normal(generator) : is_norm ? 1.0f : 0.0f;
    }
  }
}

/// `ds_config` without the outer braces; the learning rate is constant unless it says otherwise.
inline std::unique_ptr<Engine> tiny_engine(const std::string& ds_config, Communicator& communicator,
                                           const TinyModel& model = {}) {
  const FlagValues flags = {
      {"bitfall.lr_scheduler_type", {"--lr_scheduler_type", "\"constant\"", false}},
      {"bitfall.world_size", {"--world_size", std::to_string(communicator.world_size()), true}},
      {"optimizer.params.lr", {"--learning_rate", "1e-3", false}}};
  auto backend = std::make_unique<CpuBackend>();
  auto encoder = std::make_unique<Encoder>(*backend, tiny_encoder_config(model), HeadConfig{});
  return std::make_unique<Engine>(
      std::move(backend), std::move(encoder), communicator,
      parse_config("{" + ds_config + "}", "test.json", flags),
      [&](Backend&, const ParameterStore& store) { fill_weights(store, model.weight_seed); });
}

/// Samples [first, first + count) of an endless data set; key_offset is the position of the first
/// one in the global batch. The label says whether the second token is below 20.
inline Batch tiny_batch(int first, int count, int key_offset = 0) {
  Batch batch;
  batch.sequence_starts.push_back(0);
  for (int sample = first; sample < first + count; ++sample) {
    std::mt19937 generator(static_cast<std::uint32_t>(sample));
    const auto length = static_cast<int>(3 + generator() % 8);
    for (int token = 0; token < length; ++token) {
      batch.input_ids.push_back(static_cast<std::int32_t>(generator() % 40));
    }
    batch.class_labels.push_back(batch.input_ids[batch.input_ids.size() - 2] < 20 ? 1 : 0);
    batch.sequence_starts.push_back(static_cast<std::int32_t>(batch.input_ids.size()));
    batch.sample_keys.push_back(key_offset + sample - first);
  }
  return batch;
}

/// Bits of the master weights.
inline std::vector<float> masters(const Engine& engine) {
  const Tensor master = engine.updater().store().master();
  return {master.as<float>(), master.as<float>() + master.numel()};
}

inline bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

}  // namespace bitfall::test
