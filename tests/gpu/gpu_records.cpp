#include <cmath>

#include "engine/factory.h"
#include "tests/gpu/gpu_check.h"

namespace bitfall::gpu_check {
namespace {

/// A piece that is run five times on other numbers each time, and once more after the backend's
/// shared memory, which pieces may use, has become another.
void repeat_piece() {
  const std::unique_ptr<Backend> backend = make_backend("cuda", 0);
  const std::unique_ptr<Recorder> recorder = backend->make_recorder();
  const Buffer x_buffer = backend->allocate(sizeof(float));
  const Buffer y_buffer = backend->allocate(sizeof(float));
  const Tensor x = x_buffer.view(DType::f32, Shape{1}), y = y_buffer.view(DType::f32, Shape{1});
  int calls = 0;
  const auto add = [&](float value) {
    backend->copy({&value, DType::f32, Shape{1}, Device::cpu}, x);
    recorder->run({1, x.address(), y.address()}, [&] {
      ++calls;
      backend->axpby(1.0f, x, 1.0f, y);
    });
  };
  for (const float value : {1.0f, 2.0f, 3.0f, 4.0f, 5.0f}) add(value);
  report("calls for five runs of a piece", calls, Limit::at_most, 2, "");
  const double squared = backend->squared_sum(y);
  add(6.0f);
  report("calls after its memory has changed", calls, Limit::at_least, 3, "");
  float sum = 0;
  backend->copy(y, {&sum, DType::f32, Shape{1}, Device::cpu});
  const bool right = squared == 15.0 * 15.0 && sum == 21.0f;
  report("a repeated piece reads what is there", right ? 1 : 0, Limit::at_least, 1, "");
}

/// Steps of two micro-batches, an evaluation after each; lengths and sizes come again.
std::vector<double> train_and_evaluate(const EncoderConfig& model, const std::string& device) {
  constexpr int kVocab = 1000;
  SingleProcess alone;
  const auto engine = make(model, "", kMoq + ", \"gradient_accumulation_steps\": 2", device, alone);
  std::vector<double> seen;
  for (int step = 0; step < 6; ++step) {
    const int count = step == 4 ? 3 : 4;
    const std::vector<Batch> batches{random_batch(step, 0, count, 5, 20, kVocab),
                                     random_batch(step, count, count, 5, 40, kVocab)};
    seen.push_back(engine->train_batch(batches).loss);
    const Evaluation evaluation = engine->evaluate(batches.front());
    seen.push_back(evaluation.loss.value_or(NAN));
    seen.insert(seen.end(), evaluation.logits.begin(), evaluation.logits.end());
  }
  return seen;
}

}  // namespace

void records() {
  repeat_piece();
  const EncoderConfig model = bert(2, 32, 2, 1000);
  const std::vector<double> cpu = train_and_evaluate(model, "cpu");
  const std::vector<double> gpu = train_and_evaluate(model, "cuda");
  double largest = cpu.size() == gpu.size() ? 0 : INFINITY;
  for (std::size_t i = 0; i < cpu.size(); ++i)
    largest = std::fmax(largest, std::fabs(gpu[i] - cpu[i]));
  report("training and evaluation in turn beside the CPU's, f32", largest, Limit::at_most, 1e-4,
         "of losses and logits");
}

}  // namespace bitfall::gpu_check
