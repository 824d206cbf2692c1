#include <cmath>

#include "tests/support/backend_fixture.h"
#include "tests/support/numeric_gradient.h"

namespace bitfall::test {
namespace {

using Values = std::vector<double>;

constexpr double kEpsilon = 1e-3;

struct Norm {
  Values sum, gamma, beta, dy;
};

/// Elements of `norm` one after the other, for functions of all of them at once.
Values pack(const Norm& norm) {
  Values all = norm.sum;
  for (const Values* part : {&norm.gamma, &norm.beta, &norm.dy})
    all.insert(all.end(), part->begin(), part->end());
  return all;
}

Norm unpack(const Values& all, std::size_t elements, std::size_t columns) {
  const auto at = [&](std::size_t first) {
    return all.begin() + static_cast<std::ptrdiff_t>(first);
  };
  const std::size_t gamma = elements, beta = gamma + columns, dy = beta + columns;
  return {{at(0), at(gamma)}, {at(gamma), at(beta)}, {at(beta), at(dy)}, {at(dy), all.end()}};
}

/// y, and the gradients of sum(y * dy), by the definition.
struct Reference {
  Values y, dsum, dgamma, dbeta;

  explicit Reference(const Norm& norm) : norm_(norm) {
    y.resize(norm.sum.size());
    dsum.resize(norm.sum.size());
    dgamma.assign(norm.gamma.size(), 0);
    dbeta.assign(norm.gamma.size(), 0);
    for (std::size_t begin = 0; begin < y.size(); begin += norm.gamma.size()) row(begin);
  }

 private:
  void row(std::size_t begin) {
    const std::size_t columns = norm_.gamma.size();
    const auto size = static_cast<double>(columns);
    double mean = 0, variance = 0, mean_gradient = 0, mean_normalized = 0;
    for (std::size_t i = 0; i < columns; ++i) mean += norm_.sum[begin + i] / size;
    for (std::size_t i = 0; i < columns; ++i)
      variance += std::pow(norm_.sum[begin + i] - mean, 2) / size;
    const double rstd = 1 / std::sqrt(variance + kEpsilon);
    const auto normalized = [&](std::size_t i) { return (norm_.sum[begin + i] - mean) * rstd; };
    for (std::size_t i = 0; i < columns; ++i) {
      y[begin + i] = normalized(i) * norm_.gamma[i] + norm_.beta[i];
      dgamma[i] += norm_.dy[begin + i] * normalized(i);
      dbeta[i] += norm_.dy[begin + i];
      const double gradient = norm_.dy[begin + i] * norm_.gamma[i];
      mean_gradient += gradient / size;
      mean_normalized += gradient * normalized(i) / size;
    }
    for (std::size_t i = 0; i < columns; ++i) {
      dsum[begin + i] = rstd * (norm_.dy[begin + i] * norm_.gamma[i] - mean_gradient -
                                normalized(i) * mean_normalized);
    }
  }

  const Norm& norm_;
};

/// Derivative of one result of the reference along a direction.
Values tangent_of(Values Reference::*result, const Norm& norm, const Norm& direction) {
  const auto function = [&](const Values& all) {
    const Norm moved = unpack(all, norm.sum.size(), norm.gamma.size());
    return Reference(moved).*result;
  };
  return numeric_tangent(function, pack(norm), pack(direction));
}

TEST(LayerNormReference, GradientIsThatOfTheForwardPass) {
  Norm norm;
  for (int i = 0; i < 15; ++i) {
    norm.sum.push_back(std::sin(1.0 + 1.7 * i));
    norm.dy.push_back(std::cos(2.0 + 0.9 * i));
  }
  norm.gamma = {0.5, -1, 2, 1, 0.1};
  norm.beta = {1, 2, 3, 4, 5};
  const auto loss = [&](const Values& sum) {
    Norm moved = norm;
    moved.sum = sum;
    return weighted_sum(Reference(moved).y, norm.dy);
  };
  EXPECT_TRUE(close(Reference(norm).dsum, numeric_gradient(loss, norm.sum), {1e-8, 1e-8}));
}

class LayerNormTangentTest : public BackendTest {
 protected:
  /// Random operands, normalised by the forward pass, without results.
  LayerNormBackwardTangent arguments(const Shape& shape) {
    LayerNormBackwardTangent args;
    args.sum = random(shape, dtype());
    args.gamma = random(Shape{shape[1]}, dtype());
    args.mean_rstd = zeros(Shape{shape[0], 2}, DType::f32);
    LayerNormForward forward;
    forward.x = forward.sum = args.sum;
    forward.gamma = forward.beta = args.gamma;
    forward.mean_rstd = args.mean_rstd;
    forward.epsilon = static_cast<float>(kEpsilon);
    forward.y = zeros(shape, dtype());
    backend().layer_norm_forward(forward);
    args.sum_tangent = random(shape, dtype());
    args.gamma_tangent = random(Shape{shape[1]}, dtype());
    args.dy = random(shape, dtype());
    args.dy_tangent = random(shape, dtype());
    args.dsum_tangent = random(shape, dtype());
    args.dgamma_tangent = random(Shape{shape[1]}, DType::f32);
    args.dbeta_tangent = random(Shape{shape[1]}, DType::f32);
    return args;
  }

  LayerNormForwardTangent forward_arguments(const LayerNormBackwardTangent& args) {
    return {args.sum,
            args.mean_rstd,
            args.gamma,
            args.sum_tangent,
            args.gamma_tangent,
            args.gamma_tangent ? random(args.gamma.shape, dtype()) : Tensor{},
            random(args.sum.shape, dtype())};
  }

  static Norm norm_of(const LayerNormBackwardTangent& args) {
    return {values(args.sum), values(args.gamma), Values(values(args.gamma).size(), 0.0),
            values(args.dy)};
  }

  /// Zeros for what is absent.
  static Norm direction_of(const LayerNormBackwardTangent& args, const Tensor& beta_tangent) {
    const Values zero(values(args.gamma).size(), 0.0);
    return {values(args.sum_tangent), args.gamma_tangent ? values(args.gamma_tangent) : zero,
            beta_tangent ? values(beta_tangent) : zero, values(args.dy_tangent)};
  }

  /// Tangents of few columns can be several times the operands; f32 keeps its digits.
  Tolerance wide() const { return {4 * tolerance().absolute, 4 * tolerance().relative}; }

  void expect_reference(const LayerNormBackwardTangent& args) {
    SCOPED_TRACE(args.sum.shape.to_string());
    const LayerNormForwardTangent forward = forward_arguments(args);
    backend().layer_norm_forward_tangent(forward);
    backend().layer_norm_backward_tangent(args);
    const Norm norm = norm_of(args), direction = direction_of(args, forward.beta_tangent);
    EXPECT_TRUE(close(forward.y_tangent, tangent_of(&Reference::y, norm, direction), wide()));
    EXPECT_TRUE(close(args.dsum_tangent, tangent_of(&Reference::dsum, norm, direction), wide()));
    // Sums in f32 whatever the compute dtype.
    if (!args.dgamma_tangent) return;
    const Tolerance sums{1e-4, 2e-5};
    EXPECT_TRUE(close(args.dgamma_tangent, tangent_of(&Reference::dgamma, norm, direction), sums));
    EXPECT_TRUE(close(args.dbeta_tangent, tangent_of(&Reference::dbeta, norm, direction), sums));
  }
};

const Shape kShapes[] = {Shape{1, 1},    Shape{3, 7},   Shape{1, 384},
                         Shape{130, 33}, Shape{3, 384}, Shape{3, 1025}};

TEST_P(LayerNormTangentTest, MatchesTheDerivativeOfTheReference) {
  for (const Shape& shape : kShapes) expect_reference(arguments(shape));
}

TEST_P(LayerNormTangentTest, ParameterTangentsAreOptional) {
  for (const Shape& shape : {Shape{3, 7}, Shape{130, 33}}) {
    LayerNormBackwardTangent args = arguments(shape);
    args.gamma_tangent = {};
    expect_reference(args);
    args.dgamma_tangent = args.dbeta_tangent = {};
    expect_reference(args);
  }
}

TEST_P(LayerNormTangentTest, WorksInPlaceAndRepeatsItself) {
  const LayerNormBackwardTangent args = arguments(Shape{70, 130});
  backend().layer_norm_backward_tangent(args);
  LayerNormBackwardTangent in_place = args;
  in_place.dsum_tangent = in_place.dy_tangent;
  in_place.dgamma_tangent = zeros(args.gamma.shape, DType::f32);
  in_place.dbeta_tangent = zeros(args.gamma.shape, DType::f32);
  const LayerNormForwardTangent forward = forward_arguments(args);
  backend().layer_norm_forward_tangent(forward);
  backend().layer_norm_backward_tangent(in_place);
  EXPECT_TRUE(identical(in_place.dsum_tangent, args.dsum_tangent));
  EXPECT_TRUE(identical(in_place.dgamma_tangent, args.dgamma_tangent));
  EXPECT_TRUE(identical(in_place.dbeta_tangent, args.dbeta_tangent));
  LayerNormForwardTangent forward_in_place = forward;
  forward_in_place.y_tangent = forward.sum_tangent;
  backend().layer_norm_forward_tangent(forward_in_place);
  EXPECT_TRUE(identical(forward_in_place.y_tangent, forward.y_tangent));
}

TEST_P(LayerNormTangentTest, NoRowsGiveZeroParameterTangents) {
  const LayerNormBackwardTangent args = arguments(Shape{0, 7});
  backend().layer_norm_forward_tangent(forward_arguments(args));
  backend().layer_norm_backward_tangent(args);
  EXPECT_EQ(values(args.dgamma_tangent), Values(7, 0.0));
  EXPECT_EQ(values(args.dbeta_tangent), Values(7, 0.0));
}

TEST_P(LayerNormTangentTest, RefusesWhatDoesNotFit) {
  const LayerNormBackwardTangent good = arguments(Shape{2, 8});
  const LayerNormForwardTangent good_forward = forward_arguments(good);
  const Tensor other = zeros(Shape{8, 2}, dtype()), integers = zeros(Shape{2, 8}, DType::s32);
  for (Tensor LayerNormBackwardTangent::*member :
       {&LayerNormBackwardTangent::sum, &LayerNormBackwardTangent::mean_rstd,
        &LayerNormBackwardTangent::sum_tangent, &LayerNormBackwardTangent::gamma,
        &LayerNormBackwardTangent::gamma_tangent, &LayerNormBackwardTangent::dy,
        &LayerNormBackwardTangent::dy_tangent, &LayerNormBackwardTangent::dsum_tangent,
        &LayerNormBackwardTangent::dgamma_tangent, &LayerNormBackwardTangent::dbeta_tangent}) {
    LayerNormBackwardTangent args = good;
    args.*member = other;
    EXPECT_THROW(backend().layer_norm_backward_tangent(args), ShapeError);
    args.*member = integers;
    EXPECT_THROW(backend().layer_norm_backward_tangent(args), Error);
  }
  for (Tensor LayerNormForwardTangent::*member :
       {&LayerNormForwardTangent::sum, &LayerNormForwardTangent::mean_rstd,
        &LayerNormForwardTangent::gamma, &LayerNormForwardTangent::sum_tangent,
        &LayerNormForwardTangent::gamma_tangent, &LayerNormForwardTangent::beta_tangent,
        &LayerNormForwardTangent::y_tangent}) {
    LayerNormForwardTangent args = good_forward;
    args.*member = other;
    EXPECT_THROW(backend().layer_norm_forward_tangent(args), ShapeError);
    args.*member = integers;
    EXPECT_THROW(backend().layer_norm_forward_tangent(args), Error);
  }
  LayerNormBackwardTangent one = good;
  one.dbeta_tangent = {};
  EXPECT_THROW(backend().layer_norm_backward_tangent(one), ShapeError);
  LayerNormForwardTangent one_forward = good_forward;
  one_forward.gamma_tangent = {};
  EXPECT_THROW(backend().layer_norm_forward_tangent(one_forward), ShapeError);
}

BITFALL_BACKEND_SUITE(LayerNormTangentTest);

}  // namespace
}  // namespace bitfall::test
