// How fast the CUDA backend is: every number of the table that needs no PyTorch.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <functional>
#include <random>

#include "core/error.h"
#include "engine/cuda_library.h"
#include "engine/factory.h"
#include "tests/gpu/gpu_check.h"

namespace bitfall::gpu_check {
namespace {

const auto kProgramStart = std::chrono::steady_clock::now();

double seconds_since(std::chrono::steady_clock::time_point begin) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
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

EncoderConfig minilm_size() { return bert(6, 384, 12, 30522); }
EncoderConfig base_size() { return bert(12, 768, 12, 30522); }

void start_speed() {
  SingleProcess alone;
  const auto engine = make(minilm_size(), "bf16", "", "cuda", alone);
  const Batch batch = random_batch(0, 0, 32, 128, 128, 30000);
  engine->train_batch({&batch, 1});
  report("start to first step, MiniLM size", seconds_since(kProgramStart), Limit::at_most, 5, "s");
}

/// The names are those that benchmarks/workers/torch_gpu.py looks for.
void step_speed() {
  for (const std::string precision : {"bf16", "fp16"}) {
    const auto measure = [&](const std::string& name, const EncoderConfig& model, int samples) {
      report(concat("step, ", name, " size, ", samples, " x 128, ", precision),
             step_seconds(model, precision, "", samples), Limit::none, 0, "s");
    };
    measure("MiniLM", minilm_size(), 32);
    measure("BERT-base", base_size(), 32);
    measure("BERT-base", base_size(), 256);
  }
}

/// bf16 products without sparsity in FLOP/s, as the makers state it; 0 for a card not listed.
double matrix_peak(const std::string& gpu) {
  constexpr std::pair<const char*, double> kCards[] = {
      {"H200", 989e12}, {"H100 PCIe", 756e12}, {"H100", 989e12}, {"A100", 312e12}};
  for (const auto& [card, peak] : kCards) {
    if (gpu.find(card) != std::string::npos) return peak;
  }
  return 0;
}

/// FLOP/s of a product that fills the card, by Backend::linear_forward in bf16.
double product_rate() {
  const auto backend = make_backend("cuda");
  constexpr std::int64_t kSize = 8192;
  const Shape shape{kSize, kSize};
  const Buffer x = backend->allocate(2 * kSize * kSize), weight = backend->allocate(x.bytes()),
               y = backend->allocate(x.bytes());
  const auto tensor = [&](const Buffer& buffer) { return buffer.view(DType::bf16, shape); };
  // Of zeros a product is faster than of weights.
  std::mt19937 generator(1);
  std::vector<BFloat16> values(static_cast<std::size_t>(kSize * kSize));
  for (BFloat16& value : values)
    value =
        from_float<BFloat16>(static_cast<float>(static_cast<std::int32_t>(generator())) * 1e-10f);
  const Tensor host{values.data(), DType::bf16, shape, Device::cpu};
  backend->copy(host, tensor(x));
  backend->copy(host, tensor(weight));
  const double seconds = median_seconds(*backend, 10, [&] {
    backend->linear_forward(tensor(x), tensor(weight), {}, tensor(y), Accumulate::no);
  });
  return 2.0 * kSize * kSize * kSize / seconds;
}

void moq_and_peak_speed() {
  const double off = step_seconds(base_size(), "bf16", "", 256),
               on = step_seconds(base_size(), "bf16", kMoq, 256);
  report("MoQ on against off, BERT-base size, 256 x 128", on / off, Limit::at_most, 1.02, "");
  // 6 FLOP per weight of the encoder and token, and attention's products.
  const double flops = 6.0 * 256 * 128 * (12 * 12.0 * 768 * 768 + 12 * 2.0 * 128 * 768);
  const double products = product_rate();
  report("model FLOP rate, BERT-base size, 256 x 128, bf16", flops / off / 1e12, Limit::none, 0,
         "TFLOP/s");
  report("rate of a product of 8192, bf16", products / 1e12, Limit::none, 0, "TFLOP/s");
  report("model FLOP rate beside that of the product", flops / off / products, Limit::none, 0, "");
  const std::string gpu = cuda_library().devices.front().name;
  const double peak = matrix_peak(gpu);
  report("model FLOP rate beside the matrix peak of " + gpu, peak > 0 ? flops / off / peak : 0,
         peak > 0 ? Limit::at_least : Limit::none, 0.45, peak > 0 ? "" : "(unknown card)");
}

void quantizer_speed() {
  const auto backend = make_backend("cuda");
  constexpr std::int64_t kTensor = 1'000'000, kNumel = 100 * kTensor;
  const Buffer master = backend->allocate(4 * kNumel), working = backend->allocate(4 * kNumel);
  const Tensor from = master.view(DType::f32, Shape{kNumel});
  const Tensor to = working.view(DType::bf16, Shape{kNumel});
  std::vector<FakeQuantizeRange> tensors;
  for (std::int64_t begin = 0; begin < kNumel; begin += kTensor)
    tensors.push_back({begin, kTensor, {.bits = 8, .groups = 8}});
  const double quantize =
      median_seconds(*backend, 20, [&] { backend->fake_quantize(tensors, from, to); });
  // The masters are read and the working weights written: 6 bytes each. A copy of n bytes moves 2
  // n.
  const Tensor part = from.flat_slice(0, kNumel * 6 / 8),
               target = working.view(DType::f32, part.shape);
  const double copy = median_seconds(*backend, 20, [&] { backend->copy(part, target); });
  report("quantizer, 100 tensors of 1M in 8 groups, beside a copy", copy / quantize,
         Limit::at_least, 0.8, "of its speed");
}

/// Adam and what is published after it, of the same tensors as above.
void update_speed() {
  const auto backend = make_backend("cuda");
  constexpr std::int64_t kTensor = 1'000'000, kNumel = 100 * kTensor;
  const Buffer memory = backend->allocate(4 * 4 * kNumel),
               target = backend->allocate(4 * 4 * kNumel);
  const Buffer decision = backend->allocate(sizeof(UpdateDecision));
  const Tensor all = memory.view(DType::f32, Shape{4 * kNumel});
  const auto part = [&](std::int64_t index) { return all.flat_slice(index * kNumel, kNumel); };
  const AdamTensors tensors{decision.view(DType::s8, Shape{sizeof(UpdateDecision)}), part(0),
                            part(1), part(2), part(3)};
  const Tensor working = target.view(DType::bf16, Shape{kNumel});
  std::vector<AdamRange> updated;
  std::vector<FakeQuantizeRange> published;
  for (std::int64_t begin = 0; begin < kNumel; begin += kTensor) {
    updated.push_back({begin, kTensor});
    published.push_back({begin, kTensor, {.bits = 8, .groups = 8}});
  }
  const double update = median_seconds(
      *backend, 20, [&] { backend->adam_update(updated, tensors, published, working); });
  // 16 bytes of an element are read and 14 written.
  const Tensor from = all.flat_slice(0, kNumel * 15 / 4), to = target.view(DType::f32, from.shape);
  const double copy = median_seconds(*backend, 20, [&] { backend->copy(from, to); });
  report("Adam and quantizer, 100 tensors of 1M in 8 groups, beside a copy", copy / update,
         Limit::none, 0, "of its speed");
}

/// The shortest of those that a training computes whose blocks begin to lose bits at once.
void eigenvalue_speed() {
  const std::string section =
      ", \"quantize_training\": {\"enabled\": true, \"quantize_bits\": {\"start_bits\": 16, "
      "\"target_bits\": 8}, \"quantize_schedule\": {\"quantize_period\": 1, "
      "\"schedule_offset\": 0}, \"eigenvalue\": {\"enabled\": true, \"tol\": 1e-2, \"max_iter\": "
      "100, "
      "\"stability\": 1e-6}}";
  SingleProcess alone;
  const auto engine = make(base_size(), "bf16", section, "cuda", alone);
  const Batch batch = random_batch(0, 0, 32, 128, 128, 30000);
  double shortest = INFINITY;
  for (int step = 0; step < 12; ++step) {
    engine->updater().timings();
    const bool computed = !engine->train_batch({&batch, 1}).eigenvalues.empty();
    if (computed) shortest = std::min(shortest, engine->updater().timings()["eigenvalues"]);
  }
  report("eigenvalues of 12 blocks, BERT-base size, 32 x 128", shortest, Limit::none, 0, "s");
}

}  // namespace

void speed() {
  start_speed();
  step_speed();
  moq_and_peak_speed();
  quantizer_speed();
  update_speed();
  eigenvalue_speed();
}

}  // namespace bitfall::gpu_check
