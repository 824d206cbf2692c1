#include "engine/optimizer.h"

#include <gtest/gtest.h>

#include <cmath>

#include "csrc_cpu/cpu_backend.h"

namespace bitfall {
namespace {

const std::vector<ParameterSpec> kSpecs = {
    {"embeddings.word_embeddings.weight", {3, 2}},
    {"layer.0.dense.weight", {2, 2}, 0},
    {"layer.0.dense.bias", {2}, 0},
    {"layer.0.output.LayerNorm.weight", {2}, 0},
    {"classifier.weight", {1, 2}},
};

class OptimizerTest : public ::testing::Test {
 protected:
  CpuBackend backend;
  ParameterStore store{backend, kSpecs, DType::f32, ParameterStore::WorkingCopy::shared};

  /// A decision to update by `multiplier` times the gradient.
  Tensor decision(float multiplier) {
    decision_.gradient_multiplier = multiplier;
    return {&decision_, DType::s8, Shape{sizeof(decision_)}, Device::cpu};
  }

  void fill(const Tensor& tensor, float value) {
    for (std::int64_t i = 0; i < tensor.numel(); ++i) tensor.as<float>()[i] = value;
  }

 private:
  UpdateDecision decision_;
};

TEST(Decays, SparesBiasesAndLayerNorms) {
  EXPECT_TRUE(decays("bert.encoder.layer.0.attention.self.query.weight"));
  EXPECT_TRUE(decays("bert.embeddings.word_embeddings.weight"));
  EXPECT_FALSE(decays("bert.encoder.layer.0.attention.self.query.bias"));
  EXPECT_FALSE(decays("bert.encoder.layer.0.output.LayerNorm.weight"));
}

TEST_F(OptimizerTest, FirstAdamWStepMovesByTheLearningRateAndDecaysMatricesOnly) {
  OptimizerConfig config;
  config.weight_decay = 0.1;
  Optimizer optimizer(backend, store, config, default_groups(store, config));
  for (std::size_t i = 0; i < kSpecs.size(); ++i) {
    fill(store.master(i), 1.0f);
    fill(store.gradient(i), 4.0f);
  }
  optimizer.set_learning_rate(0.01);
  optimizer.step(store, decision(0.5f), {});
  // m / (1 - beta1) = g, v / (1 - beta2) = g^2: a first step of lr * sign(g), whatever the size.
  for (std::size_t i = 0; i < kSpecs.size(); ++i) {
    const double decay = decays(kSpecs[i].name) ? 0.01 * 0.1 : 0.0;
    EXPECT_NEAR(store.master(i).as<float>()[0], 1.0 - decay - 0.01, 1e-6) << kSpecs[i].name;
  }
  EXPECT_EQ(optimizer.steps(), 1);
  EXPECT_NEAR(optimizer.exp_avg().as<float>()[0], 0.1 * 2.0, 1e-6);
  EXPECT_NEAR(optimizer.exp_avg_sq().as<float>()[0], 0.001 * 4.0, 1e-7);
}

TEST_F(OptimizerTest, TenStepsEqualAScalarAdam) {
  OptimizerConfig config;
  config.betas = {0.8, 0.95};
  config.eps = 1e-6;
  config.weight_decay = 0.05;
  config.adam_w_mode = false;
  config.lr = 1e-2;
  Optimizer optimizer(backend, store, config, default_groups(store, config));
  const std::size_t index = store.index_of("layer.0.dense.weight");
  fill(store.master(index), 0.5f);
  double w = 0.5, m = 0, v = 0;
  for (int t = 1; t <= 10; ++t) {
    const double gradient = std::sin(static_cast<double>(t));
    fill(store.gradient(index), static_cast<float>(gradient));
    optimizer.step(store, decision(1.0f), {});
    const double g = gradient + 0.05 * w;
    m = 0.8 * m + 0.2 * g;
    v = 0.95 * v + 0.05 * g * g;
    w -= 1e-2 * (m / (1 - std::pow(0.8, t))) / (std::sqrt(v / (1 - std::pow(0.95, t))) + 1e-6);
    EXPECT_NEAR(store.master(index).as<float>()[3], w, 2e-6) << "step " << t;
  }
}

TEST_F(OptimizerTest, EveryGroupHasItsOwnNumbers) {
  ParameterGroup fast{{0, 4}, 0.1, 0.5};
  ParameterGroup slow{{1, 2, 3}, 0.01, 0.0, {0.5, 0.9}};
  Optimizer optimizer(backend, store, {}, {fast, slow});
  for (std::size_t i = 0; i < kSpecs.size(); ++i) {
    fill(store.master(i), 1.0f);
    fill(store.gradient(i), 2.0f);
  }
  optimizer.step(store, decision(1.0f), {});
  for (const std::size_t i : fast.parameters) {
    EXPECT_NEAR(store.master(i).as<float>()[1], 1.0 - 0.1 * 0.5 - 0.1, 1e-6);
  }
  for (const std::size_t i : slow.parameters) {
    EXPECT_NEAR(store.master(i).as<float>()[1], 1.0 - 0.01, 1e-6);
    const std::int64_t offset = store.parameters()[i].offset;
    EXPECT_NEAR(optimizer.exp_avg().as<float>()[offset], 0.5 * 2.0, 1e-6);
  }

  fast.learning_rate = 0;
  optimizer.set_numbers({fast, slow});
  const float before = store.master(std::size_t{0}).as<float>()[0];
  optimizer.step(store, decision(1.0f), {});
  EXPECT_EQ(store.master(std::size_t{0}).as<float>()[0], before);
}

TEST_F(OptimizerTest, RefusesGroupsThatDoNotFit) {
  const std::vector<ParameterGroup> twice = {{{0, 1, 2, 3, 4}}, {{0}}};
  EXPECT_THROW(Optimizer(backend, store, {}, twice), ConfigError);
  EXPECT_THROW(Optimizer(backend, store, {}, {{{0, 1, 2, 3}}}), ConfigError);
  ParameterGroup all{{0, 1, 2, 3, 4}, 0.1};
  Optimizer optimizer(backend, store, {}, {all});
  EXPECT_THROW(optimizer.set_numbers({all, all}), ConfigError);
  all.learning_rate = std::nan("");
  EXPECT_THROW(optimizer.set_numbers({all}), ConfigError);
  all.learning_rate = 0.1;
  all.betas = {0.9, 1.0};
  EXPECT_THROW(optimizer.set_numbers({all}), ConfigError);
}

TEST_F(OptimizerTest, GapsBetweenParametersStayZero) {
  OptimizerConfig config;
  config.weight_decay = 0.1;
  Optimizer optimizer(backend, store, config, default_groups(store, config));
  for (std::size_t i = 0; i < kSpecs.size(); ++i) fill(store.gradient(i), 1.0f);
  optimizer.set_learning_rate(0.1);
  optimizer.step(store, decision(1.0f), {});
  for (std::int64_t i = 6; i < 16; ++i) EXPECT_EQ(store.master().as<float>()[i], 0.0f);
}

}  // namespace
}  // namespace bitfall
