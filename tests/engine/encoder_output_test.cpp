// The encoder without a head: its output, and gradients from a gradient of that output.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>

#include "engine/encoder.h"
#include "tests/engine/golden_case.h"
#include "tests/engine/gradient_check.h"

namespace bitfall {
namespace {

using ::testing::HasSubstr;

constexpr ForwardContext kTrain{Mode::train, 7, 3};
constexpr ForwardContext kDifferentiate{Mode::differentiate, 0, 0};
constexpr ForwardContext kEvaluate{Mode::evaluate, 0, 0};

/// The encoder of a golden model alone, with the loss sum(direction * output).
class OutputCase {
 public:
  OutputCase(const std::string& name, OutputRows rows, DType compute_dtype)
      : golden(name, DType::f32),
        model(golden.backend, golden.model.config(), rows),
        store(golden.backend, model.parameters(), compute_dtype,
              ParameterStore::WorkingCopy::separate),
        batch(golden.batch) {
    batch.class_labels.clear();
    batch.span_positions.clear();
    for (std::size_t i = 0; i < store.parameters().size(); ++i) {
      const std::size_t index = golden.store.index_of(store.parameters()[i].name);
      golden.backend.copy(golden.store.master(index), store.master(i));
    }
    publish();
    model.bind(store.views(store.working()), store.views(store.gradient()));
  }

  void publish() { golden.backend.cast(store.master(), store.working()); }

  /// [R, H] in the compute dtype; the same numbers on every call.
  Tensor direction() {
    const Shape shape = model.logits().shape;
    const auto numel = static_cast<std::size_t>(shape.numel());
    std::vector<float> values(numel);
    for (std::size_t i = 0; i < numel; ++i) values[i] = std::sin(0.7f * static_cast<float>(i));
    buffer = golden.backend.allocate(numel * sizeof(float));
    const Tensor result = buffer.view(store.compute_dtype(), shape);
    golden.backend.cast({values.data(), DType::f32, shape, Device::cpu}, result);
    return result;
  }

  double loss(const ForwardContext& context) {
    model.forward(batch, context);
    const std::vector<float> output = to_floats(model.logits()), weights = to_floats(direction());
    double sum = 0;
    for (std::size_t i = 0; i < output.size(); ++i) sum += double{output[i]} * double{weights[i]};
    return sum;
  }

  std::vector<float> gradients(const ForwardContext& context) {
    model.forward(batch, context);
    model.backward_from(direction(), Accumulate::no, {});
    return to_floats(store.gradient());
  }

  GoldenCase golden;
  Encoder model;
  ParameterStore store;
  Batch batch;
  Buffer buffer;
};

class EncoderOutput : public ::testing::TestWithParam<OutputRows> {};

INSTANTIATE_TEST_SUITE_P(Rows, EncoderOutput,
                         ::testing::Values(OutputRows::first_token, OutputRows::all_tokens));

TEST_P(EncoderOutput, GradientsMatchDifferences) {
  OutputCase output("tiny_classification_gelu", GetParam(), DType::f32);
  expect_gradients_match_differences(output, kTrain, {.absolute = 2e-2, .negligible = 1e-3});
}

TEST_P(EncoderOutput, HalfTypesFollowF32) {
  OutputCase reference("tiny_classification_gelu", GetParam(), DType::f32);
  const std::vector<float> gradients = reference.gradients(kDifferentiate);
  const std::vector<float> values = to_floats(reference.model.logits());
  for (const DType dtype : {DType::bf16, DType::f16}) {
    const double tolerance = dtype == DType::bf16 ? 0.08 : 0.01;
    OutputCase half("tiny_classification_gelu", GetParam(), dtype);
    EXPECT_LT(relative_error(half.gradients(kDifferentiate), gradients), tolerance) << name(dtype);
    EXPECT_LT(relative_error(to_floats(half.model.logits()), values), tolerance) << name(dtype);
  }
}

TEST(EncoderOutputRows, FirstTokenRowsAreThoseOfAllTokens) {
  OutputCase all("tiny_classification_gelu", OutputRows::all_tokens, DType::f32);
  OutputCase first("tiny_classification_gelu", OutputRows::first_token, DType::f32);
  for (const ForwardContext& context : {kEvaluate, kTrain}) {
    all.model.forward(all.batch, context);
    first.model.forward(first.batch, context);
    const std::vector<float> tokens = to_floats(all.model.logits());
    const std::vector<float> rows = to_floats(first.model.logits());
    const auto hidden = static_cast<std::size_t>(all.model.config().hidden_size);
    for (std::size_t i = 0; i < rows.size(); ++i) {
      const auto token = static_cast<std::size_t>(all.batch.sequence_starts[i / hidden]);
      ASSERT_NEAR(rows[i], tokens[token * hidden + i % hidden], 1e-5f) << i;
    }
  }
}

/// The gradient of cross-entropy with respect to the logits, by hand.
TEST(EncoderBackwardFrom, GradientOfTheLogitsGivesThatOfTheLoss) {
  GoldenCase golden("tiny_classification_gelu", DType::f32);
  const std::vector<float> expected = golden.gradients(kTrain);
  golden.model.forward(golden.batch, kTrain);
  const Tensor logits = golden.model.logits();
  std::vector<float> d_logits = to_floats(logits);
  const std::int64_t rows = logits.shape[0], classes = logits.shape[1];
  for (std::int64_t row = 0; row < rows; ++row) {
    float* const values = d_logits.data() + row * classes;
    float sum = 0;
    for (std::int64_t c = 0; c < classes; ++c) sum += std::exp(values[c]);
    for (std::int64_t c = 0; c < classes; ++c) {
      const bool is_label = golden.batch.class_labels[static_cast<std::size_t>(row)] == c;
      values[c] = (std::exp(values[c]) / sum - (is_label ? 1.0f : 0.0f)) / static_cast<float>(rows);
    }
  }
  golden.model.backward_from({d_logits.data(), DType::f32, logits.shape, Device::cpu},
                             Accumulate::no, {});
  EXPECT_LT(relative_error(to_floats(golden.store.gradient()), expected), 1e-5);
}

TEST(EncoderPositionIds, AreThoseOfTheCaller) {
  OutputCase output("tiny_classification_gelu", OutputRows::all_tokens, DType::f32);
  const double counted = output.loss(kEvaluate);
  for (std::int64_t b = 0; b < output.batch.num_sequences(); ++b) {
    const auto index = static_cast<std::size_t>(b);
    const auto& starts = output.batch.sequence_starts;
    for (std::int32_t p = 0; p < starts[index + 1] - starts[index]; ++p) {
      output.batch.position_ids.push_back(p);
    }
  }
  EXPECT_EQ(output.loss(kEvaluate), counted);
  output.batch.position_ids[1] = 5;
  EXPECT_NE(output.loss(kEvaluate), counted);
}

TEST(EncoderOutputErrors, WhatDoesNotFitIsRefused) {
  OutputCase output("tiny_classification_gelu", OutputRows::all_tokens, DType::f32);
  const auto forward = [&] { output.model.forward(output.batch, kTrain); };
  output.batch.position_ids.assign(output.batch.input_ids.size(), 16);
  EXPECT_THAT(shape_error(forward), HasSubstr("position_ids[0] = 16: expected 0..15"));
  output.batch.position_ids.assign(3, 0);
  EXPECT_THAT(shape_error(forward), HasSubstr("position_ids has 3 entries"));
  output.batch.position_ids.clear();
  output.batch.class_labels = {0, 1, 0, 1};
  EXPECT_THAT(shape_error(forward), HasSubstr("without a head"));
  output.batch.class_labels.clear();

  forward();
  EXPECT_THAT(shape_error([&] { output.model.backward(1.0f, Accumulate::no, {}); }),
              HasSubstr("no labels"));
  Tensor wrong = output.direction();
  wrong.shape = Shape{1, wrong.shape.numel()};
  const auto backward_from = [&](const Tensor& d_logits) {
    output.model.backward_from(d_logits, Accumulate::no, {});
  };
  EXPECT_THAT(shape_error([&] { backward_from(wrong); }), HasSubstr("expected f32 [25, 32]"));
  backward_from(output.direction());
  EXPECT_THAT(shape_error([&] { backward_from(output.direction()); }), HasSubstr("forward pass"));
}

}  // namespace
}  // namespace bitfall
