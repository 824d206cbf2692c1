#include "engine/engine.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <set>

#include "core/error.h"
#include "tests/support/tiny_engine.h"

namespace bitfall {
namespace {

using test::masters;
using test::same_bits;
using test::tiny_batch;
using test::tiny_engine;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

const std::string kQuantize = R"("quantize_training": {"enabled": true,
    "quantize_bits": {"start_bits": 8, "target_bits": 6},
    "quantize_schedule": {"quantize_period": 2, "schedule_offset": 1}, "quantize_groups": 4)";

class EngineTest : public ::testing::Test {
 protected:
  SingleProcess communicator;

  std::unique_ptr<Engine> make(const std::string& ds_config, const test::TinyModel& model = {}) {
    return tiny_engine(ds_config, communicator, model);
  }

  std::string error_of(const std::string& ds_config) {
    try {
      make(ds_config);
    } catch (const ConfigError& error) {
      return error.what();
    }
    return "no error";
  }
};

double distance(const std::vector<float>& a, const std::vector<float>& b) {
  double sum = 0;
  for (std::size_t i = 0; i < a.size(); ++i) sum += std::pow(double{a[i]} - double{b[i]}, 2);
  return std::sqrt(sum);
}

TEST_F(EngineTest, OneLayerOverfitsOneBatch) {
  const auto engine =
      make(R"("train_batch_size": 8, "optimizer": {"params": {"lr": 1e-2}})", {.num_layers = 1});
  const std::vector<Batch> batch = {tiny_batch(0, 8)};
  const double first = engine->train_batch(batch).loss;
  double last = first;
  for (int step = 0; step < 60; ++step) last = engine->train_batch(batch).loss;
  EXPECT_GT(first, 0.4);
  EXPECT_LT(last, 0.01);
  EXPECT_EQ(engine->updater().global_step(), 61);
  EXPECT_LT(engine->evaluate(batch[0]).loss.value(), 0.01);
}

// The same samples with the same keys have the same dropout masks, however they are cut.
TEST_F(EngineTest, AccumulationEqualsOneBigBatch) {
  const std::string adam = R"(, "optimizer": {"params": {"eps": 1e-3}}, "gradient_clipping": 1.0)";
  const test::TinyModel model{.dropout = 0.2f};
  const auto whole = make(R"("train_batch_size": 8)" + adam, model);
  const auto parts =
      make(R"("train_batch_size": 8, "gradient_accumulation_steps": 4)" + adam, model);
  for (int step = 0; step < 3; ++step) {
    const std::vector<Batch> one = {tiny_batch(8 * step, 8)};
    std::vector<Batch> four;
    for (int i = 0; i < 4; ++i) four.push_back(tiny_batch(8 * step + 2 * i, 2, 2 * i));
    const StepResult expected = whole->train_batch(one);
    const StepResult seen = parts->train_batch(four);
    EXPECT_NEAR(seen.loss, expected.loss, 1e-6);
    EXPECT_NEAR(seen.grad_norm, expected.grad_norm, 1e-5);
  }
  EXPECT_LT(distance(masters(*whole), masters(*parts)), 2e-5);
}

// The last step of an epoch may have fewer and smaller micro-batches; samples count alike.
TEST_F(EngineTest, UnevenMicroBatchesAreWeightedBySamples) {
  const auto whole = make(R"("train_batch_size": 4)");
  const auto parts = make(R"("train_batch_size": 6, "gradient_accumulation_steps": 3)");
  const StepResult expected = whole->train_batch(std::vector<Batch>{tiny_batch(0, 4)});
  const StepResult seen =
      parts->train_batch(std::vector<Batch>{tiny_batch(0, 3), tiny_batch(3, 1, 3)});
  EXPECT_NEAR(seen.loss, expected.loss, 1e-6);
  EXPECT_NEAR(seen.grad_norm, expected.grad_norm, 1e-5);
}

// With a huge epsilon, Adam's first update is lr / epsilon times the gradient.
TEST_F(EngineTest, ClippingLimitsTheGradientNotItsReport) {
  const auto engine = make(R"("train_batch_size": 8, "gradient_clipping": 0.05,
      "optimizer": {"params": {"lr": 1e4, "eps": 1e4}})");
  const std::vector<float> before = masters(*engine);
  const StepResult result = engine->train_batch(std::vector<Batch>{tiny_batch(0, 8)});
  EXPECT_GT(result.grad_norm, 0.2);
  EXPECT_NEAR(distance(masters(*engine), before), 0.05, 0.05 * 2e-3);
}

TEST_F(EngineTest, OverflowMovesNothingButTheLossScale) {
  const auto engine = make(R"("train_batch_size": 8, "fp16": {"enabled": true,
      "initial_scale_power": 40, "hysteresis": 1}, )" +
                           kQuantize + "}");
  const std::vector<float> before = masters(*engine);
  const std::vector<Batch> batch = {tiny_batch(0, 8)};
  const StepResult skipped = engine->train_batch(batch);
  EXPECT_TRUE(skipped.skipped);
  EXPECT_EQ(skipped.step, 0);
  EXPECT_EQ(skipped.loss_scale, 0x1p40);
  EXPECT_THAT(skipped.bits, ElementsAre(16, 16, 16));
  EXPECT_TRUE(same_bits(masters(*engine), before));
  int tries = 1;
  while (engine->train_batch(batch).skipped) ++tries;
  EXPECT_EQ(engine->updater().skipped_steps(), tries);
  EXPECT_EQ(engine->updater().global_step(), 1);
  EXPECT_LT(tries, 40);
  EXPECT_GT(distance(masters(*engine), before), 0);
}

TEST_F(EngineTest, NonFiniteGradientWithoutLossScalingIsAnErrorThatNamesTheParameter) {
  const auto engine = make(R"("train_batch_size": 8)");
  const Tensor weight =
      engine->updater().store().master(engine->updater().store().index_of("classifier.weight"));
  weight.as<float>()[0] = std::numeric_limits<float>::quiet_NaN();
  const std::vector<float> before = masters(*engine);
  try {
    engine->train_batch(std::vector<Batch>{tiny_batch(0, 8)});
    FAIL() << "expected an error";
  } catch (const TrainingError& error) {
    EXPECT_THAT(error.what(), HasSubstr("step 1: the gradient of '"));
    EXPECT_THAT(error.what(), HasSubstr("loss nan"));
  }
  EXPECT_TRUE(same_bits(masters(*engine), before));
}

TEST_F(EngineTest, BitsFollowTheSchedule) {
  for (const char* precision : {"", R"("bf16": {"enabled": true}, )"}) {
    const auto engine = make(precision + (R"("train_batch_size": 4, )" + kQuantize + "}"));
    const int width = *precision == '\0' ? 32 : 16;
    std::vector<int> trace;
    std::vector<std::int64_t> drops;
    for (int step = 0; step < 6; ++step) {
      const StepResult result = engine->train_batch(std::vector<Batch>{tiny_batch(4 * step, 4)});
      ASSERT_EQ(result.bits.size(), engine->updater().bit_states().size());
      trace.push_back(result.bits[0]);
      for (const BitDrop& drop : result.drops) drops.push_back(drop.step);
    }
    // Offset 1: quantized from step 2 on; period 2: drops at 1 + 2 and 1 + 4, in three states.
    EXPECT_THAT(trace, ElementsAre(width, 8, 7, 7, 6, 6));
    EXPECT_THAT(drops, ElementsAre(3, 3, 3, 5, 5, 5));
  }
}

TEST_F(EngineTest, EvaluationWeightsLieOnTheGridAndTrainingDoesNotNoticeThem) {
  const std::string config = R"("train_batch_size": 4, )" + kQuantize + "}";
  const auto engine = make(config, {.dropout = 0.1f});
  const auto undisturbed = make(config, {.dropout = 0.1f});
  for (int step = 0; step < 6; ++step) {
    const std::vector<Batch> batch = {tiny_batch(4 * step, 4)};
    undisturbed->train_batch(batch);
    engine->train_batch(batch);
    EXPECT_TRUE(engine->evaluate(batch[0]).loss.has_value());
  }
  EXPECT_TRUE(same_bits(masters(*engine), masters(*undisturbed)));

  const Tensor flat = engine->updater().evaluation_weights();
  const ParameterStore& store = engine->updater().store();
  const std::size_t index = store.index_of("bert.encoder.layer.1.intermediate.dense.weight");
  const Parameter& parameter = store.parameters()[index];
  const float* values = flat.as<float>() + parameter.offset;
  for (std::int64_t group = 0; group < 4; ++group) {
    const float* begin = values + group * parameter.numel / 4;
    EXPECT_LE(std::set<float>(begin, begin + parameter.numel / 4).size(), 64u);
  }
  const auto sizes = engine->updater().quantized_sizes();
  EXPECT_EQ(sizes.at(parameter.name).bits, 6);
  EXPECT_EQ(sizes.at(parameter.name).bytes_f32, parameter.numel * 4);
  EXPECT_LT(sizes.at(parameter.name).bytes_quantized, parameter.numel + 64);
  EXPECT_EQ(sizes.at("classifier.bias").bits, 32);
  const double error = engine->updater().quantization_error().at(parameter.name);
  EXPECT_GT(error, 0.001);
  EXPECT_LT(error, 0.1);
}

TEST_F(EngineTest, EvaluationInF32WhateverTheComputeDtype) {
  const auto full = make(R"("train_batch_size": 4)");
  const auto half = make(R"("train_batch_size": 4, "bf16": {"enabled": true})");
  const Batch batch = tiny_batch(0, 4);
  EXPECT_EQ(full->evaluate(batch).logits, half->evaluate(batch).logits);
  Batch unlabeled = batch;
  unlabeled.class_labels.clear();
  EXPECT_FALSE(full->evaluate(unlabeled).loss.has_value());
  EXPECT_TRUE(full->updater().store().working_is_master());
  EXPECT_EQ(full->updater().memory_bytes().at("working"), 0);
}

TEST_F(EngineTest, EigenvaluesAreTakenWhenABlockWouldDrop) {
  const auto engine = make(R"("train_batch_size": 4, )" + kQuantize +
                           R"(, "eigenvalue": {"enabled": true, "layer_num": 2}})");
  for (int step = 1; step <= 5; ++step) {
    const StepResult result = engine->train_batch(std::vector<Batch>{tiny_batch(4 * step, 4)});
    if (step != 3) continue;
    ASSERT_EQ(result.eigenvalues.size(), 2u);
    EXPECT_EQ(result.eigenvalues[0].name, "bert.encoder.layer.0");
    EXPECT_EQ(std::max(result.eigenvalues[0].normalized, result.eigenvalues[1].normalized), 1.0);
    ASSERT_EQ(result.drops.size(), 3u);
    EXPECT_EQ(result.drops[0].factor, result.eigenvalues[0].factor);
  }
  EXPECT_GT(engine->updater().timings().at("eigenvalues"), 0);
  EXPECT_EQ(engine->updater().timings().at("eigenvalues"), 0);
}

TEST_F(EngineTest, ConfigMustFitTheModel) {
  const auto with = [](const std::string& inner) {
    return R"("train_batch_size": 4, "quantize_training": {"enabled": true,
        "quantize_bits": {"target_bits": 8}, )" +
           inner + "}";
  };
  EXPECT_THAT(error_of(with(R"("eigenvalue": {"enabled": true, "layer_num": 12})")),
              HasSubstr("the model has 2 layers"));
  EXPECT_THAT(error_of(with(R"("eigenvalue": {"enabled": true, "layer_name": "roberta.layer"})")),
              HasSubstr("the model's layers are \"bert.encoder.layer\""));
  EXPECT_THAT(error_of(with(R"("quantize_groups": 7)")), HasSubstr("quantize_groups = 7"));
}

TEST_F(EngineTest, ZeroWithOneRankChangesNothing) {
  const std::string config = R"("train_batch_size": 4, "gradient_accumulation_steps": 2,
      "gradient_clipping": 0.5, "bf16": {"enabled": true}, )" +
                             kQuantize + "}";
  const auto expected = make(config, {.dropout = 0.1f});
  std::vector<std::unique_ptr<Engine>> sliced;
  for (const char* stage : {"1", "2"}) {
    sliced.push_back(
        make(config + R"(, "zero_optimization": {"stage": )" + stage + "}", {.dropout = 0.1f}));
  }
  for (int step = 0; step < 5; ++step) {
    const std::vector<Batch> batches = {tiny_batch(4 * step, 2), tiny_batch(4 * step + 2, 2, 2)};
    const StepResult result = expected->train_batch(batches);
    for (const auto& engine : sliced) {
      const StepResult seen = engine->train_batch(batches);
      EXPECT_EQ(seen.loss, result.loss);
      EXPECT_EQ(seen.grad_norm, result.grad_norm);
    }
  }
  for (const auto& engine : sliced) {
    EXPECT_TRUE(test::same_bits(masters(*engine), masters(*expected)));
    EXPECT_EQ(engine->updater().memory_bytes(), expected->updater().memory_bytes());
  }
}

TEST_F(EngineTest, WrongMicroBatchesAreRefused) {
  const auto engine = make(R"("train_batch_size": 4, "gradient_accumulation_steps": 2)");
  EXPECT_THROW(engine->train_batch(std::vector<Batch>(3, tiny_batch(0, 2))), ShapeError);
  EXPECT_THROW(engine->train_batch(std::vector<Batch>{}), ShapeError);
  Batch unlabeled = tiny_batch(0, 2);
  unlabeled.class_labels.clear();
  EXPECT_THROW(engine->train_batch(std::vector<Batch>{unlabeled, unlabeled}), ShapeError);
}

}  // namespace
}  // namespace bitfall
