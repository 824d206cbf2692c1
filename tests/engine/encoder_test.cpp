#include "engine/encoder.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>

#include "tests/engine/golden_case.h"
#include "tests/engine/gradient_check.h"

namespace bitfall {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

// At this step no input of the golden ReLU model is near the kink, where differences fail.
constexpr ForwardContext kTrain{Mode::train, 7, 5};
constexpr ForwardContext kDifferentiate{Mode::differentiate, 0, 0};
constexpr ForwardContext kEvaluate{Mode::evaluate, 0, 0};

class EncoderGoldens : public ::testing::TestWithParam<const char*> {};

INSTANTIATE_TEST_SUITE_P(Tiny, EncoderGoldens,
                         ::testing::Values("tiny_classification_gelu", "tiny_classification_relu",
                                           "tiny_regression_gelu_new", "tiny_span_tanh"));

TEST_P(EncoderGoldens, LogitsLossAndEveryGradientMatchPyTorch) {
  GoldenCase golden(GetParam(), DType::f32);
  for (const ForwardContext& context : {kEvaluate, kDifferentiate}) {
    EXPECT_NEAR(golden.loss(context), read_floats(golden.file, "loss")[0], 2e-5);
    EXPECT_LT(relative_error(to_floats(golden.model.logits()), read_floats(golden.file, "logits")),
              2e-5);
  }
  golden.model.backward(1.0f, Accumulate::no, {});
  for (std::size_t i = 0; i < golden.store.parameters().size(); ++i) {
    const std::string& name = golden.store.parameters()[i].name;
    const std::vector<float> expected = read_floats(golden.file, "gradient." + name);
    const std::vector<float> seen = to_floats(golden.store.gradient(i));
    // Some gradients are zero but for rounding: shifting all scores of a softmax changes nothing.
    EXPECT_LT(distance(seen, expected), 2e-5 * norm(expected) + 1e-6) << name;
  }
}

TEST_P(EncoderGoldens, HalfTypesFollowF32) {
  GoldenCase reference(GetParam(), DType::f32);
  const std::vector<float> gradients = reference.gradients(kDifferentiate);
  const std::vector<float> logits = to_floats(reference.model.logits());
  const float loss = reference.model.loss().as<float>()[0];
  for (const DType dtype : {DType::bf16, DType::f16}) {
    const double tolerance = dtype == DType::bf16 ? 0.08 : 0.01;
    GoldenCase half(GetParam(), dtype);
    EXPECT_LT(relative_error(half.gradients(kDifferentiate), gradients), tolerance) << name(dtype);
    EXPECT_LT(relative_error(to_floats(half.model.logits()), logits), tolerance) << name(dtype);
    EXPECT_NEAR(half.model.loss().as<float>()[0], loss, tolerance * std::max(1.0f, loss))
        << name(dtype);
  }
}

TEST_P(EncoderGoldens, GradientsWithDropoutMatchDifferencesOfTheLoss) {
  GoldenCase golden(GetParam(), DType::f32);
  expect_gradients_match_differences(golden, kTrain, {.absolute = 2e-3, .negligible = 1e-4});
}

TEST_P(EncoderGoldens, GradientsAccumulateScaleAndAreReproducible) {
  GoldenCase golden(GetParam(), DType::f32);
  const std::vector<float> once = golden.gradients(kTrain);
  EXPECT_EQ(golden.gradients(kTrain), once);
  golden.model.forward(golden.batch, kTrain);
  golden.model.backward(2.0f, Accumulate::yes, {});
  const std::vector<float> three_times = to_floats(golden.store.gradient());
  for (std::size_t i = 0; i < once.size(); ++i) {
    ASSERT_NEAR(three_times[i], 3 * once[i], 1e-5f + 1e-5f * std::fabs(once[i])) << i;
  }
}

TEST_P(EncoderGoldens, ASampleDoesNotSeeItsNeighbours) {
  GoldenCase golden(GetParam(), DType::f32);
  golden.model.forward(golden.batch, kTrain);
  const std::vector<float> together = to_floats(golden.model.logits());
  const Batch all = golden.batch;
  std::vector<float> alone;
  for (std::size_t b = 0; b + 1 < all.sequence_starts.size(); ++b) {
    const auto first = all.sequence_starts[b], last = all.sequence_starts[b + 1];
    Batch one;
    one.input_ids.assign(all.input_ids.begin() + first, all.input_ids.begin() + last);
    one.token_type_ids.assign(all.token_type_ids.begin() + first,
                              all.token_type_ids.begin() + last);
    one.sequence_starts = {0, last - first};
    one.sample_keys = {all.sample_keys[b]};
    golden.model.forward(one, kTrain);
    EXPECT_FALSE(golden.model.loss());
    const std::vector<float> logits = to_floats(golden.model.logits());
    alone.insert(alone.end(), logits.begin(), logits.end());
  }
  EXPECT_LT(relative_error(alone, together), 1e-5);
}

TEST(Encoder, TellsWhenTheGradientsOfABlockAreComplete) {
  GoldenCase golden("tiny_classification_gelu", DType::f32);
  const std::vector<float> complete = golden.gradients(kTrain);
  std::vector<int> order;
  golden.model.forward(golden.batch, kTrain);
  golden.model.backward(1.0f, Accumulate::no, [&](int block) {
    order.push_back(block);
    if (block == kNoBlock) return;
    const FlatRange range = golden.store.block_range(block);
    const std::vector<float> now = to_floats(golden.store.gradient());
    EXPECT_TRUE(std::equal(now.begin() + range.begin, now.begin() + range.begin + range.numel,
                           complete.begin() + range.begin));
    golden.backend.fill_zero(golden.store.gradient());
  });
  EXPECT_THAT(order, ElementsAre(1, 0, kNoBlock));
}

TEST(Encoder, DropoutDependsOnSeedStepAndSampleAlone) {
  GoldenCase golden("tiny_classification_gelu", DType::f32);
  const double loss = golden.loss(kTrain);
  EXPECT_EQ(golden.loss(kTrain), loss);
  EXPECT_NE(golden.loss({Mode::train, 8, 3}), loss);
  EXPECT_NE(golden.loss({Mode::train, 7, 4}), loss);
  EXPECT_NE(golden.loss(kEvaluate), loss);
  golden.batch.sample_keys[0] = 17;
  EXPECT_NE(golden.loss(kTrain), loss);
}

TEST(Encoder, AllocatesOnlyToGrow) {
  GoldenCase golden("tiny_classification_gelu", DType::f32);
  golden.gradients(kTrain);
  const std::size_t bytes = golden.model.workspace_bytes();
  EXPECT_GT(bytes, 0u);
  golden.loss(kEvaluate);
  golden.gradients(kDifferentiate);
  EXPECT_EQ(golden.model.workspace_bytes(), bytes);
}

TEST(Encoder, MalformedBatchesAreRefused) {
  GoldenCase golden("tiny_classification_gelu", DType::f32);
  const std::vector<std::pair<std::function<void(Batch&)>, std::string>> cases{
      {[](Batch& b) { b.input_ids[3] = 100; }, "input_ids[3] = 100"},
      {[](Batch& b) { b.input_ids[0] = -1; }, "input_ids[0] = -1"},
      {[](Batch& b) { b.token_type_ids[1] = 2; }, "token_type_ids[1] = 2"},
      {[](Batch& b) { b.token_type_ids.pop_back(); }, "token_type_ids has 24"},
      {[](Batch& b) {
         b.sequence_starts = {0, 0, 25};
       },
       "sequence 0 of the batch has 0 tokens"},
      {[](Batch& b) {
         b.sequence_starts = {0, 20, 10, 25};
       },
       "has 20 tokens: expected 1..16"},
      {[](Batch& b) {
         b.sequence_starts = {0, 2147483647, -2147483647, 25};
       },
       "expected 1..16"},
      {[](Batch& b) { b.sequence_starts.back() = 24; }, "ends with 24"},
      {[](Batch& b) { b.sequence_starts[0] = 1; }, "sequence_starts[0] = 1"},
      {[](Batch& b) { b.sequence_starts.clear(); }, "sequence_starts has 0"},
      {[](Batch& b) { b.sequence_starts = {0}; }, "sequence_starts has 1"},
      {[](Batch& b) { b.sample_keys.clear(); }, "sample_keys has 0 entries, expected 4"},
      {[](Batch& b) { b.class_labels[2] = 3; }, "class_labels[2] = 3: expected 0..2"},
      {[](Batch& b) { b.class_labels[0] = -100; }, "class_labels[0] = -100"},
      {[](Batch& b) { b.class_labels.pop_back(); }, "class_labels has 3"},
      {[](Batch& b) { b.regression_labels.resize(4); }, "regression_labels given"},
      {[](Batch& b) { b.span_positions.resize(8); }, "span_positions given"}};
  for (const auto& [spoil, expected] : cases) {
    Batch batch = golden.batch;
    spoil(batch);
    EXPECT_THAT(shape_error([&] { golden.model.forward(batch, kTrain); }), HasSubstr(expected));
  }
  EXPECT_GT(golden.loss(kTrain), 0.0);
}

TEST(Encoder, LabelsOfOtherHeadsAreRefused) {
  GoldenCase regression("tiny_regression_gelu_new", DType::f32);
  regression.batch.class_labels = {0, 1, 0, 1};
  EXPECT_THAT(shape_error([&] { regression.loss(kEvaluate); }), HasSubstr("class_labels given"));
  GoldenCase span("tiny_span_tanh", DType::f32);
  span.batch.span_positions[2] = 1;
  EXPECT_THAT(shape_error([&] { span.loss(kEvaluate); }),
              HasSubstr("span_positions[1][0] = 1: expected 0..0"));
  span.batch.span_positions.pop_back();
  EXPECT_THAT(shape_error([&] { span.loss(kEvaluate); }), HasSubstr("expected 8"));
  span.batch.class_labels = {0, 1, 0, 1};
  EXPECT_THAT(shape_error([&] { span.loss(kEvaluate); }), HasSubstr("class_labels given"));
}

TEST(Encoder, CallsOutOfOrderAreRefused) {
  GoldenCase golden("tiny_classification_gelu", DType::f32);
  Encoder unbound(golden.backend, golden.model.config(), {HeadType::classification, 3});
  EXPECT_THAT(shape_error([&] { unbound.forward(golden.batch, kTrain); }), HasSubstr("bind"));
  const auto backward = [&] { golden.model.backward(1.0f, Accumulate::no, {}); };
  EXPECT_THAT(shape_error(backward), HasSubstr("forward pass"));
  golden.loss(kEvaluate);
  EXPECT_THAT(shape_error(backward), HasSubstr("forward pass"));
  golden.gradients(kTrain);
  EXPECT_THAT(shape_error(backward), HasSubstr("forward pass"));
  golden.batch.class_labels.clear();
  golden.model.forward(golden.batch, kTrain);
  EXPECT_THAT(shape_error(backward), HasSubstr("no labels"));
  golden.model.bind(golden.store.views(golden.store.working()), {});
  golden.model.forward(golden.batch, kTrain);
  EXPECT_THAT(shape_error(backward), HasSubstr("none were given to bind"));
}

TEST(Encoder, BindRefusesWhatDoesNotFit) {
  GoldenCase golden("tiny_classification_gelu", DType::f32);
  const std::vector<Tensor> weights = golden.store.views(golden.store.working());
  std::vector<Tensor> wrong = weights;
  wrong[0].shape = Shape{100, 31};
  EXPECT_THAT(shape_error([&] { golden.model.bind(wrong, {}); }),
              HasSubstr("word_embeddings.weight are f32 [100, 31], expected f32 [100, 32]"));
  wrong = weights;
  wrong[6] = weights[5];  // the key weight is not behind the query weight
  EXPECT_THAT(shape_error([&] { golden.model.bind(wrong, {}); }), HasSubstr("adjacent"));
  wrong.pop_back();
  EXPECT_THAT(shape_error([&] { golden.model.bind(wrong, {}); }), HasSubstr("parameters"));
}

TEST(Heads, NumberOfLabelsMustFitTheType) {
  const EncoderConfig config;
  EXPECT_THROW(make_head(config, {HeadType::classification, 1}), ConfigError);
  EXPECT_THROW(make_head(config, {HeadType::regression, 2}), ConfigError);
  EXPECT_THROW(make_head(config, {HeadType::span, 3}), ConfigError);
  EXPECT_THROW(parse_head_type("pooler"), ConfigError);
  EXPECT_EQ(parse_head_type("span"), HeadType::span);
}

}  // namespace
}  // namespace bitfall
