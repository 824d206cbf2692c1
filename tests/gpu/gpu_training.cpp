#include <cmath>
#include <iostream>
#include <random>

#include "core/error.h"
#include "engine/factory.h"
#include "tests/gpu/gpu_check.h"

namespace bitfall::gpu_check {
namespace {

bool passed_so_far = true;

/// Matrices N(0, 0.02), norms 1, biases 0: the same on every device.
void fill_weights(Backend& backend, const ParameterStore& store) {
  std::mt19937 generator(1);
  std::normal_distribution<float> normal(0.0f, 0.02f);
  for (std::size_t index = 0; index < store.parameters().size(); ++index) {
    const Parameter& parameter = store.parameters()[index];
    const bool is_norm = parameter.name.find("LayerNorm.weight") != std::string::npos;
    std::vector<float> values(static_cast<std::size_t>(parameter.numel), is_norm ? 1.0f : 0.0f);
    if (parameter.shape.rank() > 1)
      for (float& value : values) value = normal(generator);
    backend.copy({values.data(), DType::f32, parameter.shape, Device::cpu}, store.master(index));
  }
}

}  // namespace

void report(const std::string& name, double value, Limit kind, double limit,
            const std::string& unit) {
  const bool passed =
      kind == Limit::none || (kind == Limit::at_most ? value <= limit : value >= limit);
  passed_so_far = passed_so_far && passed;
  std::cout << concat("{\"check\": \"", name, "\", \"value\": ", std::isfinite(value) ? value : -1,
                      ", \"unit\": \"", unit, "\", \"bound\": \"",
                      kind == Limit::at_most ? "at most" : "at least",
                      "\", \"limit\": ", kind == Limit::none ? "null" : std::to_string(limit),
                      ", \"passed\": ", passed ? "true" : "false", "}\n")
            << std::flush;
}

bool all_passed() { return passed_so_far; }

const std::string kMoq =
    ", \"quantize_training\": {\"enabled\": true, \"quantize_bits\": {\"start_bits\": 10, "
    "\"target_bits\": 8}, \"quantize_schedule\": {\"quantize_period\": 4, \"schedule_offset\": 0}, "
    "\"quantize_groups\": 8}";

EncoderConfig bert(std::int64_t layers, std::int64_t hidden, std::int64_t heads,
                   std::int64_t vocab_size) {
  EncoderConfig config;
  config.num_hidden_layers = layers;
  config.hidden_size = hidden;
  config.num_attention_heads = heads;
  config.intermediate_size = 4 * hidden;
  config.vocab_size = vocab_size;
  return config;
}

std::unique_ptr<Engine> make(const EncoderConfig& model, const std::string& precision,
                             const std::string& more, const std::string& device,
                             Communicator& communicator) {
  std::string text = "{\"gradient_clipping\": 1.0";
  if (!precision.empty()) text += ", \"" + precision + "\": {\"enabled\": true}";
  const FlagValues flags = {
      {"bitfall.lr_scheduler_type", {"--lr_scheduler_type", "\"constant\"", false}},
      {"bitfall.world_size", {"--world_size", std::to_string(communicator.world_size()), true}},
      {"optimizer.params.lr", {"--learning_rate", "1e-4", false}}};
  auto backend = make_backend(device, communicator.local_rank());
  Communicator& connected = connect_devices(*backend, communicator);
  auto encoder = std::make_unique<Encoder>(*backend, model, HeadConfig{});
  return std::make_unique<Engine>(std::move(backend), std::move(encoder), connected,
                                  parse_config(text + more + "}", "gpu_check", flags),
                                  fill_weights);
}

Batch random_batch(int step, int first, int count, int shortest, int longest, int vocab_size) {
  Batch batch;
  batch.sequence_starts.push_back(0);
  for (int sample = first; sample < first + count; ++sample) {
    std::mt19937 generator(static_cast<std::uint32_t>(1000 * step + sample));
    const int length =
        shortest + static_cast<int>(generator() % static_cast<unsigned>(longest - shortest + 1));
    for (int token = 0; token < length; ++token)
      batch.input_ids.push_back(
          static_cast<std::int32_t>(generator() % static_cast<unsigned>(vocab_size)));
    batch.class_labels.push_back(batch.input_ids.back() % 2);
    batch.sequence_starts.push_back(static_cast<std::int32_t>(batch.input_ids.size()));
    batch.sample_keys.push_back(sample);
  }
  return batch;
}

}  // namespace bitfall::gpu_check
