// What scripts/gpu_check.sh runs on a machine with a GPU, besides the tests of operations: losses
// beside the CPU's, repeated runs, two ranks, and speed. One JSON object per result on stdout.
//
// usage: gpu_check compare | smoke (compare in seconds) | ranks | speed
#include <algorithm>
#include <chrono>
#include <cmath>
#include <filesystem>
#include <functional>
#include <iostream>
#include <random>
#include <string_view>

#include "core/error.h"
#include "engine/encoder.h"
#include "engine/engine.h"
#include "engine/factory.h"

namespace bitfall {
namespace {

const auto kProgramStart = std::chrono::steady_clock::now();

double seconds_since(std::chrono::steady_clock::time_point begin) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

bool all_passed = true;

/// A value that must not exceed its limit (or, with Limit::at_least, fall below it).
enum class Limit { at_most, at_least, none };

void report(const std::string& name, double value, Limit kind, double limit,
            const std::string& unit) {
  const bool passed =
      kind == Limit::none || (kind == Limit::at_most ? value <= limit : value >= limit);
  all_passed = all_passed && passed;
  std::cout << concat("{\"check\": \"", name, "\", \"value\": ", std::isfinite(value) ? value : -1,
                      ", \"unit\": \"", unit,
                      "\", \"limit\": ", kind == Limit::none ? "null" : std::to_string(limit),
                      ", \"passed\": ", passed ? "true" : "false", "}\n")
            << std::flush;
}

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

const std::string kMoq =
    ", \"quantize_training\": {\"enabled\": true, \"quantize_bits\": {\"start_bits\": 10, "
    "\"target_bits\": 8}, \"quantize_schedule\": {\"quantize_period\": 4, \"schedule_offset\": 0}, "
    "\"quantize_groups\": 8}";

/// `precision` is "", "bf16" or "fp16".
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

/// Samples [first, first + count) of the batch of `step`, with lengths in [shortest, longest].
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

constexpr int kSmallVocab = 1000;

/// How much a comparison trains.
struct Sizes {
  EncoderConfig model;
  int steps, samples, longest;
};

std::vector<double> train(Engine& engine, const Sizes& sizes, int first_step) {
  std::vector<double> losses;
  for (int step = first_step; step < sizes.steps; ++step) {
    const Batch batch = random_batch(step, 0, sizes.samples, 5, sizes.longest, kSmallVocab);
    losses.push_back(engine.train_batch({&batch, 1}).loss);
  }
  return losses;
}

std::vector<double> losses(const Sizes& sizes, const std::string& precision,
                           const std::string& device) {
  SingleProcess alone;
  return train(*make(sizes.model, precision, kMoq, device, alone), sizes, 0);
}

double largest_difference(const std::vector<double>& a, const std::vector<double>& b,
                          std::size_t count) {
  double largest = a.size() == b.size() ? 0 : INFINITY;
  for (std::size_t i = 0; i < std::min(count, a.size()); ++i)
    largest = std::max(largest, std::fabs(a[i] - b[i]) / std::fabs(b[i]));
  return largest;
}

/// Steps on one device, a checkpoint, the rest on the other: beside all steps on one.
void move_checkpoint(const Sizes& sizes, const std::string& from, const std::string& to) {
  SingleProcess alone;
  Sizes begin = sizes;
  begin.steps = sizes.steps / 2;
  const auto folder = std::filesystem::temp_directory_path() / "bitfall_gpu_check";
  const auto first = make(sizes.model, "", kMoq, from, alone);
  train(*first, begin, 0);
  first->updater().save_checkpoint(folder, "moved", "");
  const auto second = make(sizes.model, "", kMoq, to, alone);
  second->updater().load_checkpoint(folder, "moved");
  const std::vector<double> moved = train(*second, sizes, begin.steps);
  const std::vector<double> stayed = train(*first, sizes, begin.steps);
  std::filesystem::remove_all(folder);
  report("checkpoint from " + from + " to " + to, largest_difference(moved, stayed, moved.size()),
         Limit::at_most, 1e-4, "relative");
}

/// A short MoQ training with dropout on both devices, and twice on the GPU.
void compare(const Sizes& sizes) {
  for (const std::string precision : {"", "bf16", "fp16"}) {
    const std::string name = precision.empty() ? "f32" : precision;
    const std::vector<double> cpu = losses(sizes, precision, "cpu");
    const std::vector<double> gpu = losses(sizes, precision, "cuda");
    report("loss beside the CPU's, first 3 steps, " + name, largest_difference(gpu, cpu, 3),
           Limit::at_most, precision.empty() ? 1e-5 : 1e-3, "relative");
    report(concat("loss beside the CPU's, ", sizes.steps, " steps, ", name),
           largest_difference(gpu, cpu, cpu.size()), Limit::at_most, 2e-2, "relative");
    const bool repeated = losses(sizes, precision, "cuda") == gpu;
    report("repeated run gives equal losses, " + name, repeated ? 1 : 0, Limit::at_least, 1, "");
  }
  move_checkpoint(sizes, "cuda", "cpu");
  move_checkpoint(sizes, "cpu", "cuda");
}

/// Started by mpirun: every rank trains on its share; rank 0 also alone on all of it.
void ranks() {
  const std::unique_ptr<Communicator> world = make_communicator();
  constexpr int kSamples = 8;
  const int share = kSamples / world->world_size();
  const auto train_share = [&](Communicator& communicator, int first, int count) {
    const auto engine = make(bert(2, 32, 2, kSmallVocab), "", "", "cuda", communicator);
    std::vector<double> result;
    for (int step = 0; step < 3; ++step) {
      const Batch batch = random_batch(step, first, count, 5, 20, kSmallVocab);
      result.push_back(engine->train_batch({&batch, 1}).loss);
    }
    return result;
  };
  const std::vector<double> together = train_share(*world, world->rank() * share, share);
  if (world->rank() == 0) {
    SingleProcess alone;
    const std::vector<double> single = train_share(alone, 0, share * world->world_size());
    report(concat("loss of ", world->world_size(), " ranks beside one process"),
           largest_difference(together, single, single.size()), Limit::at_most, 1e-5, "relative");
  }
  world->barrier();
}

/// Median seconds of one call, the device idle before and after it.
double median_seconds(Backend& backend, int count, const std::function<void()>& call) {
  for (int i = 0; i < 3; ++i) call();
  std::vector<double> seconds;
  for (int i = 0; i < count; ++i) {
    backend.synchronize();
    const auto begin = std::chrono::steady_clock::now();
    call();
    backend.synchronize();
    seconds.push_back(seconds_since(begin));
  }
  std::nth_element(seconds.begin(), seconds.begin() + count / 2, seconds.end());
  return seconds[static_cast<std::size_t>(count / 2)];
}

double step_seconds(const EncoderConfig& model, const std::string& precision,
                    const std::string& more, int samples) {
  SingleProcess alone;
  const auto engine = make(model, precision, more, "cuda", alone);
  const Batch batch = random_batch(0, 0, samples, 128, 128, 30000);
  return median_seconds(engine->backend(), 20, [&] { engine->train_batch({&batch, 1}); });
}

void quantizer_speed() {
  const auto backend = make_backend("cuda");
  constexpr std::int64_t kNumel = 100'000'000;
  const Buffer master = backend->allocate(4 * kNumel), working = backend->allocate(4 * kNumel);
  const Tensor from = master.view(DType::f32, Shape{kNumel});
  const Tensor to = working.view(DType::bf16, Shape{kNumel});
  const FakeQuantizeRange all{0, kNumel, {.bits = 8, .groups = 8}};
  const double quantize = median_seconds(*backend, 20, [&] {
    backend->fake_quantize({&all, 1}, from, to);
  });
  // The masters are read and the working weights written: 6 bytes each. A copy of n bytes moves 2
  // n.
  const Tensor part = from.flat_slice(0, kNumel * 6 / 8),
               target = working.view(DType::f32, part.shape);
  const double copy = median_seconds(*backend, 20, [&] { backend->copy(part, target); });
  report("quantizer, 100M parameters in 8 groups, beside a copy", copy / quantize, Limit::at_least,
         0.8, "of its speed");
}

void speed() {
  {
    SingleProcess alone;
    const auto engine = make(bert(6, 384, 12, 30522), "bf16", "", "cuda", alone);
    const Batch batch = random_batch(0, 0, 32, 128, 128, 30000);
    engine->train_batch({&batch, 1});
    report("start to first step, MiniLM size", seconds_since(kProgramStart), Limit::at_most, 5,
           "s");
  }
  const EncoderConfig minilm = bert(6, 384, 12, 30522), base = bert(12, 768, 12, 30522);
  for (const std::string precision : {"bf16", "fp16"}) {
    report("step, MiniLM size, 32 x 128, " + precision, step_seconds(minilm, precision, "", 32),
           Limit::none, 0, "s");
    report("step, BERT-base size, 32 x 128, " + precision, step_seconds(base, precision, "", 32),
           Limit::none, 0, "s");
    report("step, BERT-base size, 256 x 128, " + precision, step_seconds(base, precision, "", 256),
           Limit::none, 0, "s");
  }
  const double off = step_seconds(base, "bf16", "", 256),
               on = step_seconds(base, "bf16", kMoq, 256);
  report("MoQ on against off, BERT-base size, 256 x 128", on / off, Limit::at_most, 1.02, "");
  // 6 FLOP per weight of the encoder and token, and attention's products.
  const double flops = 6.0 * 256 * 128 * (12 * 12.0 * 768 * 768 + 12 * 2.0 * 128 * 768);
  report("model FLOP rate, BERT-base size, 256 x 128, bf16", flops / off / 1e12, Limit::none, 0,
         "TFLOP/s");
  quantizer_speed();
}

}  // namespace
}  // namespace bitfall

int main(int argc, char** argv) {
  const std::string_view what = argc == 2 ? argv[1] : "";
  try {
    if (what == "compare") {
      bitfall::compare({bitfall::bert(4, 128, 4, bitfall::kSmallVocab), 30, 16, 90});
    } else if (what == "smoke") {
      bitfall::compare({bitfall::bert(2, 32, 2, bitfall::kSmallVocab), 4, 4, 20});
    } else if (what == "ranks") {
      bitfall::ranks();
    } else if (what == "speed") {
      bitfall::speed();
    } else {
      std::cerr << "usage: gpu_check compare | smoke | ranks | speed\n";
      return 2;
    }
  } catch (const bitfall::Error& error) {
    std::cerr << "gpu_check: " << error.what() << "\n";
    return 1;
  }
  return bitfall::all_passed ? 0 : 1;
}
