#include <cmath>

#include "tests/support/backend_fixture.h"
#include "tests/support/numeric_gradient.h"

namespace bitfall::test {
namespace {

double reference(Activation activation, double x) {
  switch (activation) {
    case Activation::gelu:
      return 0.5 * x * std::erfc(-x / std::sqrt(2.0));
    case Activation::gelu_tanh:
      return 0.5 * x * (1 + std::tanh(std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
    case Activation::relu:
      return x > 0 ? x : 0;
    case Activation::tanh:
      return std::tanh(x);
  }
  return NAN;
}

/// Derivative of the reference; relu has 0 at its kink.
double slope(Activation activation, double x) {
  const double density = std::exp(-x * x / 2) / std::sqrt(2 * M_PI);
  const double t = std::tanh(std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x));
  switch (activation) {
    case Activation::gelu:
      return 0.5 * std::erfc(-x / std::sqrt(2.0)) + x * density;
    case Activation::gelu_tanh:
      return 0.5 * (1 + t) +
             0.5 * x * (1 - t * t) * std::sqrt(2 / M_PI) * (1 + 3 * 0.044715 * x * x);
    case Activation::relu:
      return x > 0 ? 1 : 0;
    case Activation::tanh:
      return 1 - std::pow(std::tanh(x), 2);
  }
  return NAN;
}

constexpr Activation kAll[] = {Activation::gelu, Activation::gelu_tanh, Activation::relu,
                               Activation::tanh};

class ActivationTest : public BackendTest {
 protected:
  /// Every regime: both tails, the origin, and far outside.
  Tensor inputs() {
    std::vector<double> x;
    for (double value = -12; value <= 12; value += 0.0371) x.push_back(value);
    for (const double value : {0.0, -90.0, 90.0, -3e4, 3e4}) x.push_back(value);
    return floats(Shape{1, static_cast<std::int64_t>(x.size())}, dtype(), x);
  }
};

TEST_P(ActivationTest, BackwardMatchesReferenceAndRepeatsTheForwardValue) {
  const Tensor x = inputs();
  const Tensor dy = random(x.shape, dtype());
  for (const Activation activation : kAll) {
    const Tensor dpre = zeros(x.shape, dtype()), y = zeros(x.shape, dtype());
    backend().activation_backward(activation, x, dy, dpre, y);
    std::vector<double> value, gradient;
    for (std::size_t i = 0; i < values(x).size(); ++i) {
      const double at = values(x)[i];
      value.push_back(reference(activation, at));
      const auto function = [&](const std::vector<double>& v) {
        return reference(activation, v[0]);
      };
      // At its kink relu has no derivative; the operation takes 0 there.
      const bool kink = activation == Activation::relu && at == 0;
      gradient.push_back(kink ? 0 : numeric_gradient(function, {at})[0] * values(dy)[i]);
    }
    Tolerance allowed = tolerance();
    if (dtype() == DType::f32) allowed = {1e-6, 1e-6};
    EXPECT_TRUE(close(y, value, allowed)) << static_cast<int>(activation);
    EXPECT_TRUE(close(dpre, gradient, allowed)) << static_cast<int>(activation);
  }
}

TEST_P(ActivationTest, BackwardTangentMatchesTheDerivativeOfTheBackwardPass) {
  const Tensor x = inputs(), x_tangent = random(x.shape, dtype());
  const Tensor dy = random(x.shape, dtype()), dy_tangent = random(x.shape, dtype());
  for (const Activation activation : kAll) {
    const Tensor dpre_tangent = zeros(x.shape, dtype());
    backend().activation_backward_tangent(activation, x, x_tangent, dy, dy_tangent, dpre_tangent);
    std::vector<double> expected;
    for (std::size_t i = 0; i < values(x).size(); ++i) {
      const double at = values(x)[i];
      const auto function = [&](const std::vector<double>& v) { return slope(activation, v[0]); };
      // There is no derivative at the kink of relu; the operation takes 0.
      const double curvature =
          activation == Activation::relu ? 0 : numeric_gradient(function, {at})[0];
      expected.push_back(slope(activation, at) * values(dy_tangent)[i] +
                         curvature * values(x_tangent)[i] * values(dy)[i]);
    }
    Tolerance allowed = tolerance();
    if (dtype() == DType::f32) allowed = {2e-6, 1e-6};
    EXPECT_TRUE(close(dpre_tangent, expected, allowed)) << static_cast<int>(activation);
    backend().activation_backward_tangent(activation, x, x_tangent, dy, dy_tangent, dy_tangent);
    EXPECT_TRUE(identical(dy_tangent, dpre_tangent));
  }
}

TEST_P(ActivationTest, WorksInPlaceAndWithoutTheForwardValue) {
  const Tensor x = inputs(), dy = random(x.shape, dtype());
  const Tensor dpre = zeros(x.shape, dtype());
  backend().activation_backward(Activation::gelu, x, dy, dpre, {});
  backend().activation_backward(Activation::gelu, x, dy, dy, {});
  EXPECT_TRUE(identical(dy, dpre));
}

TEST_P(ActivationTest, EveryInstructionSetGivesTheSameBits) {
  if (GetParam().device != Device::cpu) GTEST_SKIP() << "a GPU has exponentials of its own";
  BackendWorkbench generic(CpuIsa::generic);
  const Tensor x = inputs(), dy = random(x.shape, dtype());
  for (const Activation activation : kAll) {
    const Tensor here = zeros(x.shape, dtype()), there = zeros(x.shape, dtype());
    const Tensor y_here = zeros(x.shape, dtype()), y_there = zeros(x.shape, dtype());
    backend().activation_backward(activation, x, dy, here, y_here);
    generic.backend().activation_backward(activation, x, dy, there, y_there);
    EXPECT_TRUE(identical(here, there));
    EXPECT_TRUE(identical(y_here, y_there));
    backend().activation_backward_tangent(activation, x, y_here, dy, here, here);
    generic.backend().activation_backward_tangent(activation, x, y_there, dy, there, there);
    EXPECT_TRUE(identical(here, there));
  }
}

TEST_P(ActivationTest, NanStaysNan) {
  const Tensor x = floats(Shape{1, 1}, dtype(), {NAN}), dy = floats(Shape{1, 1}, dtype(), {1.0});
  for (const Activation activation : kAll) {
    const Tensor y = zeros(x.shape, dtype());
    backend().activation_backward(activation, x, dy, zeros(x.shape, dtype()), y);
    EXPECT_TRUE(std::isnan(values(y)[0])) << static_cast<int>(activation);
  }
}

TEST_P(ActivationTest, FarOutsideValuesAndSlopesAreExact) {
  for (const Activation activation : kAll) {
    const double far = dtype() == DType::f16 ? 6e4 : 3e38;
    const Tensor x = floats(Shape{1, 2}, dtype(), {far, -far});
    const Tensor dy = floats(x.shape, dtype(), {1, 1});
    const Tensor dpre = zeros(x.shape, dtype()), y = zeros(x.shape, dtype());
    backend().activation_backward(activation, x, dy, dpre, y);
    const bool odd = activation == Activation::tanh;
    const std::vector<double> value{odd ? 1 : values(x)[0], odd ? -1.0 : 0.0};
    EXPECT_EQ(values(y), value) << static_cast<int>(activation);
    EXPECT_EQ(values(dpre), (std::vector<double>{odd ? 0.0 : 1.0, 0}))
        << static_cast<int>(activation);
  }
}

TEST_P(ActivationTest, RefusesWhatDoesNotFit) {
  const Tensor x = zeros(Shape{2, 3}, dtype()), other = zeros(Shape{3, 2}, dtype());
  EXPECT_THROW(backend().activation_backward(Activation::gelu, x, other, x, {}), ShapeError);
  EXPECT_THROW(backend().activation_backward(Activation::gelu, x, x, x, other), ShapeError);
  EXPECT_THROW(backend().activation_backward(Activation::gelu, x, x, {}, {}), ShapeError);
  const Tensor integer = zeros(Shape{2, 3}, DType::s32);
  EXPECT_THROW(backend().activation_backward(Activation::gelu, integer, x, x, {}),
               UnsupportedError);
  EXPECT_THROW(backend().activation_backward(Activation::gelu, x, integer, x, {}),
               UnsupportedError);
}

TEST_P(ActivationTest, TangentRefusesWhatDoesNotFit) {
  const Tensor x = zeros(Shape{2, 3}, dtype()), integer = zeros(Shape{2, 3}, DType::s32);
  const auto run = [&](const std::vector<Tensor>& t) {
    backend().activation_backward_tangent(Activation::gelu, t[0], t[1], t[2], t[3], t[4]);
  };
  EXPECT_NO_THROW(run({x, x, x, x, x}));
  for (std::size_t which = 0; which < 5; ++which) {
    std::vector<Tensor> tensors(5, x);
    tensors[which] = zeros(Shape{3, 2}, dtype());
    EXPECT_THROW(run(tensors), ShapeError) << which;
    tensors[which] = {};
    EXPECT_THROW(run(tensors), ShapeError) << which;
    tensors[which] = integer;
    EXPECT_THROW(run(tensors), UnsupportedError) << which;
  }
}

BITFALL_BACKEND_SUITE(ActivationTest);

}  // namespace
}  // namespace bitfall::test
