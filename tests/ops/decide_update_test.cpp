// Backend::decide_update: which gradients update the weights, and with which factor.
#include <cmath>
#include <limits>

#include "tests/support/backend_fixture.h"

namespace bitfall::test {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

class DecideUpdate : public BackendTest {
 protected:
  const Tensor loss = zeros(Shape{1}, DType::f32);
  const Tensor decision = zeros(Shape{sizeof(UpdateDecision)}, DType::s8);

  UpdateDecision decide(const Tensor& gradient, const UpdateLimits& limits) {
    loss.as<float>()[0] = 0.625f;
    backend().decide_update(loss, gradient, limits, decision);
    const UpdateDecision decided = backend().last_decision();
    expect_same(*decision.as<UpdateDecision>(), decided);
    backend().decide_update(loss, backend().squared_sum(gradient), limits, decision);
    expect_same(*decision.as<UpdateDecision>(), decided);
    expect_same(backend().last_decision(), decided);
    return decided;
  }

  static void expect_same(const UpdateDecision& a, const UpdateDecision& b) {
    EXPECT_TRUE(a.grad_norm == b.grad_norm || std::isnan(a.grad_norm + b.grad_norm));
    EXPECT_EQ(a.loss, b.loss);
    EXPECT_TRUE(a.gradient_multiplier == b.gradient_multiplier || a.skip == 1);
    EXPECT_EQ(a.skip, b.skip);
  }
};

TEST_P(DecideUpdate, AFiniteGradientIsUnscaled) {
  const Tensor gradient = random(Shape{40001}, DType::f32);
  const double norm = std::sqrt(backend().squared_sum(gradient));
  for (const double scale : {1.0, 4096.0, 3.0}) {
    const UpdateDecision decided = decide(gradient, {.loss_scale = scale});
    EXPECT_EQ(decided.loss, 0.625f);
    EXPECT_EQ(decided.grad_norm, norm / scale);
    EXPECT_EQ(decided.gradient_multiplier, static_cast<float>(1 / scale));
    EXPECT_EQ(decided.skip, 0);
  }
}

TEST_P(DecideUpdate, ClippingLimitsTheUnscaledNorm) {
  const Tensor gradient = floats(Shape{2}, DType::f32, {48, 64});
  const UpdateDecision clipped = decide(gradient, {.loss_scale = 8, .gradient_clipping = 2.5});
  EXPECT_EQ(clipped.grad_norm, 10);
  EXPECT_EQ(clipped.gradient_multiplier, static_cast<float>(2.5 / (10 + 1e-6) / 8));
  EXPECT_EQ(clipped.skip, 0);
  const UpdateDecision short_enough =
      decide(gradient, {.loss_scale = 8, .gradient_clipping = 10.5});
  EXPECT_EQ(short_enough.gradient_multiplier, 0.125f);
}

TEST_P(DecideUpdate, AnEmptyOrZeroGradientUpdates) {
  for (const std::int64_t numel : {0, 5}) {
    const UpdateDecision decided =
        decide(zeros(Shape{numel}, DType::f32), {.gradient_clipping = 1});
    EXPECT_EQ(decided.grad_norm, 0);
    EXPECT_EQ(decided.gradient_multiplier, 1);
    EXPECT_EQ(decided.skip, 0);
  }
}

TEST_P(DecideUpdate, WhatIsNotFiniteIsSkipped) {
  for (const float fault : {kInfinity, -kInfinity, std::nanf("")}) {
    for (const double clipping : {0.0, 1.0}) {
      const Tensor gradient = random(Shape{20000}, DType::f32);
      gradient.as<float>()[19999] = fault;
      const UpdateDecision decided =
          decide(gradient, {.loss_scale = 1024, .gradient_clipping = clipping});
      EXPECT_EQ(decided.skip, 1);
      EXPECT_FALSE(std::isfinite(decided.grad_norm));
      EXPECT_EQ(decided.loss, 0.625f);
    }
  }
}

// Its squares are beyond f32, so their sum must not be made there.
TEST_P(DecideUpdate, LargeGradientsAreNotAnOverflow) {
  const Tensor gradient = floats(Shape{1}, DType::f32, {-0x1p127});
  const UpdateDecision decided = decide(gradient, {.loss_scale = 0x1p10, .gradient_clipping = 1});
  EXPECT_EQ(decided.grad_norm, 0x1p117);
  EXPECT_EQ(decided.skip, 0);
  EXPECT_GT(decided.gradient_multiplier, 0);
}

TEST_P(DecideUpdate, RefusesWhatDoesNotFit) {
  const Tensor gradient = zeros(Shape{8}, DType::f32);
  EXPECT_THROW(backend().decide_update(gradient, gradient, {}, decision), ShapeError);
  EXPECT_THROW(backend().decide_update(loss, gradient, {}, zeros(Shape{8}, DType::s8)), ShapeError);
  EXPECT_THROW(backend().decide_update(loss, zeros(Shape{8}, DType::bf16), {}, decision),
               UnsupportedError);
}

INSTANTIATE_TEST_SUITE_P(All, DecideUpdate, testing::ValuesIn(backend_cases({DType::f32})),
                         case_name);

}  // namespace
}  // namespace bitfall::test
