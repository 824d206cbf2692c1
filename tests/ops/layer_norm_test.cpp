#include <cmath>
#include <cstring>

#include "tests/support/backend_fixture.h"
#include "tests/support/numeric_gradient.h"

namespace bitfall::test {
namespace {

using Values = std::vector<double>;

/// What an element of `rows` x `columns` is multiplied by: 0 or the scale of kept elements.
Values mask_of(const Dropout& dropout, const Tensor& row_keys, const Shape& shape) {
  Values mask;
  for (std::int64_t row = 0; row < shape[0]; ++row) {
    const auto* key = row_keys.as<std::int32_t>() + 2 * row;
    for (std::int64_t column = 0; column < shape[1]; ++column) {
      const bool dropped = dropout_bits(dropout, static_cast<std::uint32_t>(key[0]),
                                        static_cast<std::uint32_t>(key[1]),
                                        static_cast<std::uint32_t>(column)) < dropout.threshold();
      mask.push_back(dropped ? 0.0 : double{dropout.scale()});
    }
  }
  return mask;
}

Values multiply(Values a, const Values& b) {
  for (std::size_t i = 0; i < a.size(); ++i) a[i] *= b[i];
  return a;
}

Values add(Values a, const Values& b) {
  for (std::size_t i = 0; i < a.size() && !b.empty(); ++i) a[i] += b[i];
  return a;
}

/// Layer norm of the rows of `sum`.
Values reference(const Values& sum, const Values& gamma, const Values& beta, double epsilon) {
  const std::size_t columns = gamma.size();
  Values y(sum.size());
  for (std::size_t begin = 0; begin < sum.size(); begin += columns) {
    double mean = 0, variance = 0;
    for (std::size_t i = 0; i < columns; ++i) mean += sum[begin + i] / double(columns);
    for (std::size_t i = 0; i < columns; ++i)
      variance += std::pow(sum[begin + i] - mean, 2) / double(columns);
    for (std::size_t i = 0; i < columns; ++i)
      y[begin + i] = (sum[begin + i] - mean) / std::sqrt(variance + epsilon) * gamma[i] + beta[i];
  }
  return y;
}

struct Gradients {
  Values dsum, dgamma, dbeta;
};

/// Gradients of sum(y * dy) by the formulas.
Gradients reference_gradients(const Values& sum, const Values& gamma, const Values& dy,
                              double epsilon) {
  const std::size_t columns = gamma.size();
  const Values n = reference(sum, Values(columns, 1.0), Values(columns, 0.0), epsilon);
  Gradients gradients{Values(sum.size()), Values(columns, 0.0), Values(columns, 0.0)};
  for (std::size_t begin = 0; begin < sum.size(); begin += columns) {
    double mean = 0, variance = 0, mean_g = 0, mean_gn = 0;
    for (std::size_t i = 0; i < columns; ++i) mean += sum[begin + i] / double(columns);
    for (std::size_t i = 0; i < columns; ++i) {
      variance += std::pow(sum[begin + i] - mean, 2) / double(columns);
      gradients.dgamma[i] += dy[begin + i] * n[begin + i];
      gradients.dbeta[i] += dy[begin + i];
      mean_g += dy[begin + i] * gamma[i] / double(columns);
      mean_gn += dy[begin + i] * gamma[i] * n[begin + i] / double(columns);
    }
    for (std::size_t i = begin; i < begin + columns; ++i)
      gradients.dsum[i] =
          (dy[i] * gamma[i - begin] - mean_g - n[i] * mean_gn) / std::sqrt(variance + epsilon);
  }
  return gradients;
}

class LayerNormTest : public BackendTest {
 protected:
  LayerNormForward arguments(const Shape& shape, float probability) {
    LayerNormForward args;
    args.x = random(shape, dtype());
    args.residual = random(shape, dtype());
    args.gamma = random(Shape{shape[1]}, dtype());
    args.beta = random(Shape{shape[1]}, dtype());
    args.row_keys = row_keys(shape[0]);
    args.input_dropout = {probability, 42, 1};
    args.output_dropout = {probability, 42, 2};
    args.epsilon = 1e-3f;
    args.sum = zeros(shape, dtype());
    args.mean_rstd = zeros(Shape{shape[0], 2}, DType::f32);
    args.y = zeros(shape, dtype());
    return args;
  }

  LayerNormBackward backward_arguments(const LayerNormForward& forward) {
    const Shape& shape = forward.x.shape;
    LayerNormBackward args;
    args.dy = random(shape, dtype());
    args.sum = forward.sum;
    args.mean_rstd = forward.mean_rstd;
    args.gamma = forward.gamma;
    args.row_keys = forward.row_keys;
    args.input_dropout = forward.input_dropout;
    args.output_dropout = forward.output_dropout;
    args.dresidual = zeros(shape, dtype());
    args.dx = zeros(shape, dtype());
    args.dgamma = random(Shape{shape[1]}, DType::f32);
    args.dbeta = random(Shape{shape[1]}, DType::f32);
    return args;
  }

  /// A copy of `tensor` that begins one element behind where its memory does.
  Tensor moved(const Tensor& tensor) {
    const std::size_t element = size_in_bytes(tensor.dtype);
    Tensor copy = zeros(Shape{tensor.numel() + 1}, tensor.dtype);
    copy.data = static_cast<std::byte*>(copy.data) + element;
    copy.shape = tensor.shape;
    std::memcpy(copy.data, tensor.data, static_cast<std::size_t>(tensor.numel()) * element);
    return copy;
  }

  void expect_formulas(const LayerNormForward& forward, const LayerNormBackward& gradient) {
    SCOPED_TRACE(forward.x.shape.to_string());
    const Shape& shape = forward.x.shape;
    const Values input_mask = mask_of(forward.input_dropout, forward.row_keys, shape);
    const Values output_mask = mask_of(forward.output_dropout, forward.row_keys, shape);
    backend().layer_norm_forward(forward);
    const Values gamma = values(forward.gamma), sum = values(forward.sum);
    EXPECT_TRUE(close(forward.sum,
                      add(multiply(values(forward.x), input_mask), values(forward.residual)),
                      tolerance()));
    const Values y = reference(sum, gamma, values(forward.beta), 1e-3);
    EXPECT_TRUE(close(forward.y, multiply(y, output_mask), tolerance()));
    backend().layer_norm_backward(gradient);
    const Gradients expected =
        reference_gradients(sum, gamma, multiply(values(gradient.dy), output_mask), 1e-3);
    EXPECT_TRUE(close(gradient.dresidual, expected.dsum, wide()));
    EXPECT_TRUE(close(gradient.dx, multiply(expected.dsum, input_mask), wide()));
    EXPECT_TRUE(close(gradient.dgamma, expected.dgamma, {1e-4, 2e-5}));
    EXPECT_TRUE(close(gradient.dbeta, expected.dbeta, {1e-4, 2e-5}));
  }

  /// Rounding an activation to the compute dtype moves a normalised row of few columns a lot.
  Tolerance wide() const { return {4 * tolerance().absolute, 4 * tolerance().relative}; }
};

const Shape kShapes[] = {Shape{1, 1},    Shape{3, 7},   Shape{1, 384},
                         Shape{130, 33}, Shape{3, 384}, Shape{3, 129}};

TEST_P(LayerNormTest, ForwardMatchesReference) {
  for (const Shape& shape : kShapes) {
    for (const float probability : {0.0f, 0.25f}) {
      LayerNormForward args = arguments(shape, probability);
      if (shape[0] == 3) args.residual = {};
      backend().layer_norm_forward(args);
      const Values input_mask = mask_of(args.input_dropout, args.row_keys, shape);
      const Values sum = add(multiply(values(args.x), input_mask), values(args.residual));
      EXPECT_TRUE(close(args.sum, sum, tolerance())) << shape.to_string();
      // From the stored sum, as the backward pass sees it.
      const Values y = reference(values(args.sum), values(args.gamma), values(args.beta), 1e-3);
      const Values output_mask = mask_of(args.output_dropout, args.row_keys, shape);
      EXPECT_TRUE(close(args.y, multiply(y, output_mask), tolerance())) << shape.to_string();
    }
  }
}

TEST_P(LayerNormTest, SavesMeanAndInverseDeviation) {
  LayerNormForward args = arguments(Shape{2, 200}, 0.0f);
  backend().layer_norm_forward(args);
  const Values sum = values(args.sum), saved = values(args.mean_rstd);
  for (std::size_t row = 0; row < 2; ++row) {
    double mean = 0, variance = 0;
    for (std::size_t i = 0; i < 200; ++i) mean += sum[row * 200 + i] / 200;
    for (std::size_t i = 0; i < 200; ++i) variance += std::pow(sum[row * 200 + i] - mean, 2) / 200;
    EXPECT_NEAR(saved[2 * row], mean, 1e-6);
    EXPECT_NEAR(saved[2 * row + 1], 1 / std::sqrt(variance + 1e-3), 1e-5);
  }
}

TEST_P(LayerNormTest, LargeMeanDoesNotCancel) {
  // In f32 the two-pass variance keeps 4 digits where E[x^2] - E[x]^2 would keep none.
  if (dtype() != DType::f32) return;
  LayerNormForward args = arguments(Shape{1, 384}, 0.0f);
  for (std::int64_t i = 0; i < 384; ++i) args.x.as<float>()[i] = 4096.0f + 0.25f * float(i % 4);
  args.residual = {};
  backend().layer_norm_forward(args);
  const Values y = reference(values(args.sum), values(args.gamma), values(args.beta), 1e-3);
  EXPECT_TRUE(close(args.y, y, {1e-3, 1e-3}));
}

TEST_P(LayerNormTest, BackwardMatchesNumericGradients) {
  for (const Shape& shape : {Shape{1, 1}, Shape{3, 7}, Shape{2, 33}, Shape{2, 130}}) {
    for (const float probability : {0.0f, 0.25f}) {
      const LayerNormForward forward = arguments(shape, probability);
      backend().layer_norm_forward(forward);
      const LayerNormBackward args = backward_arguments(forward);
      backend().layer_norm_backward(args);

      const Values sum = values(args.sum), gamma = values(args.gamma), beta = values(forward.beta);
      const Values dy =
          multiply(values(args.dy), mask_of(args.output_dropout, args.row_keys, shape));
      const Values dsum = numeric_gradient(
          [&](const Values& s) { return weighted_sum(reference(s, gamma, beta, 1e-3), dy); }, sum);
      const Values dgamma = numeric_gradient(
          [&](const Values& g) { return weighted_sum(reference(sum, g, beta, 1e-3), dy); }, gamma);
      const Values dbeta = numeric_gradient(
          [&](const Values& b) { return weighted_sum(reference(sum, gamma, b, 1e-3), dy); }, beta);
      EXPECT_TRUE(close(args.dresidual, dsum, wide())) << shape.to_string();
      EXPECT_TRUE(close(args.dx, multiply(dsum, mask_of(args.input_dropout, args.row_keys, shape)),
                        wide()));
      EXPECT_TRUE(close(args.dgamma, dgamma, {2e-5, 2e-5})) << shape.to_string();
      EXPECT_TRUE(close(args.dbeta, dbeta, {2e-5, 2e-5})) << shape.to_string();
    }
  }
}

/// A GPU takes rows of up to 256, 512, 768 and 1024 columns in different ways, more columns in
/// another, and sizes that are no multiples of eight, or addresses that are none of 16 bytes.
TEST_P(LayerNormTest, HiddenSizesOfModelsMatchTheFormulas) {
  for (const Shape& shape : {Shape{3, 8}, Shape{19, 128}, Shape{17, 384}, Shape{9, 768},
                             Shape{5, 1024}, Shape{3, 1032}, Shape{2, 2304}, Shape{3, 100}}) {
    const LayerNormForward forward = arguments(shape, 0.25f);
    expect_formulas(forward, backward_arguments(forward));
  }
}

TEST_P(LayerNormTest, WorksAtAnyAddress) {
  LayerNormForward forward = arguments(Shape{3, 384}, 0.25f);
  LayerNormBackward backward = backward_arguments(forward);
  forward.residual = moved(forward.residual);  // one of them is enough
  backward.dx = moved(backward.dx);
  expect_formulas(forward, backward);

  forward = arguments(Shape{2, 1032}, 0.25f);
  for (Tensor* tensor : {&forward.x, &forward.gamma, &forward.beta, &forward.sum, &forward.y})
    *tensor = moved(*tensor);
  backward = backward_arguments(forward);
  for (Tensor* tensor : {&backward.dy, &backward.dresidual}) *tensor = moved(*tensor);
  expect_formulas(forward, backward);
}

TEST_P(LayerNormTest, RestoresItsOutputFromTheSum) {
  for (const Shape& shape : {Shape{3, 384}, Shape{2, 1032}, Shape{3, 33}}) {
    LayerNormForward args = arguments(shape, 0.25f);
    args.output_dropout = {};
    backend().layer_norm_forward(args);
    const Values sum = values(args.sum);
    LayerNormForward restored;
    restored.x = restored.sum = args.sum;
    restored.gamma = args.gamma;
    restored.beta = args.beta;
    restored.epsilon = args.epsilon;
    restored.mean_rstd = zeros(args.mean_rstd.shape, DType::f32);
    restored.y = zeros(shape, dtype());
    backend().layer_norm_forward(restored);
    EXPECT_TRUE(identical(restored.y, args.y));
    EXPECT_TRUE(identical(restored.mean_rstd, args.mean_rstd));
    EXPECT_EQ(values(args.sum), sum);
  }
}

TEST_P(LayerNormTest, NamesTheHiddenSizeThatIsTooLarge) {
  if (GetParam().device == Device::cpu) return;
  const auto message = [](auto&& operation) {
    try {
      operation();
    } catch (const UnsupportedError& error) {
      return std::string(error.what());
    }
    return std::string();
  };
  const LayerNormForward fits = arguments(Shape{1, 12288}, 0.0f);
  EXPECT_EQ(message([&] { backend().layer_norm_forward(fits); }), "");
  EXPECT_NE(message([&] {
              backend().layer_norm_backward(backward_arguments(fits));
            }).find("layer_norm_backward on cuda: hidden_size 12288"),
            std::string::npos);
  EXPECT_NE(message([&] {
              backend().layer_norm_forward(arguments(Shape{1, 12289}, 0.0f));
            }).find("layer_norm_forward on cuda: hidden_size 12289"),
            std::string::npos);
}

TEST_P(LayerNormTest, ParameterGradientsOfManyRowsAccumulate) {
  const LayerNormForward forward = arguments(Shape{1300, 33}, 0.1f);
  backend().layer_norm_forward(forward);
  LayerNormBackward args = backward_arguments(forward);
  backend().layer_norm_backward(args);
  const Values dy =
      multiply(values(args.dy), mask_of(args.output_dropout, args.row_keys, args.dy.shape));
  Values dbeta(33, 0.0);
  for (std::size_t i = 0; i < dy.size(); ++i) dbeta[i % 33] += dy[i];
  EXPECT_TRUE(close(args.dbeta, dbeta, {1e-4, 1e-5}));
  const Values dgamma = values(args.dgamma);
  args.accumulate = Accumulate::yes;
  backend().layer_norm_backward(args);
  EXPECT_TRUE(close(args.dbeta, add(dbeta, dbeta), {1e-4, 1e-5}));
  EXPECT_TRUE(close(args.dgamma, add(dgamma, dgamma), {1e-6, 1e-6}));
}

TEST_P(LayerNormTest, WorksInPlace) {
  LayerNormForward args = arguments(Shape{5, 130}, 0.1f);
  backend().layer_norm_forward(args);
  LayerNormForward in_place = args;
  in_place.sum = args.x;
  in_place.y = zeros(args.x.shape, dtype());
  backend().layer_norm_forward(in_place);
  EXPECT_TRUE(identical(in_place.y, args.y));
  EXPECT_TRUE(identical(in_place.sum, args.sum));

  LayerNormBackward backward = backward_arguments(args);
  backend().layer_norm_backward(backward);
  LayerNormBackward backward_in_place = backward;
  backward_in_place.dresidual = backward.dy;
  backward_in_place.dx = zeros(args.x.shape, dtype());
  backend().layer_norm_backward(backward_in_place);
  EXPECT_TRUE(identical(backward_in_place.dresidual, backward.dresidual));
  EXPECT_TRUE(identical(backward_in_place.dx, backward.dx));
}

TEST_P(LayerNormTest, NoRowsGiveZeroParameterGradients) {
  const LayerNormForward forward = arguments(Shape{0, 7}, 0.1f);
  backend().layer_norm_forward(forward);
  const LayerNormBackward args = backward_arguments(forward);
  backend().layer_norm_backward(args);
  EXPECT_EQ(values(args.dgamma), Values(7, 0.0));
  EXPECT_EQ(values(args.dbeta), Values(7, 0.0));
}

TEST_P(LayerNormTest, RefusesWhatDoesNotFit) {
  const LayerNormForward good = arguments(Shape{2, 8}, 0.1f);
  const auto refuses = [&](auto change) {
    LayerNormForward args = good;
    change(args);
    EXPECT_THROW(backend().layer_norm_forward(args), Error);
  };
  refuses([&](auto& a) { a.x = a.gamma; });
  refuses([&](auto& a) { a.residual = zeros(Shape{8, 2}, dtype()); });
  refuses([&](auto& a) { a.gamma = zeros(Shape{9}, dtype()); });
  refuses([&](auto& a) { a.gamma = zeros(Shape{8}, DType::s32); });
  refuses([&](auto& a) { a.beta = {}; });
  refuses([&](auto& a) { a.row_keys = {}; });
  refuses([&](auto& a) { a.sum = {}; });
  refuses([&](auto& a) { a.mean_rstd = zeros(Shape{2}, DType::f32); });
  refuses([&](auto& a) { a.x = zeros(Shape{2, 8}, DType::s32); });
  backend().layer_norm_forward(good);

  const LayerNormBackward good_backward = backward_arguments(good);
  const auto refuses_backward = [&](auto change) {
    LayerNormBackward args = good_backward;
    change(args);
    EXPECT_THROW(backend().layer_norm_backward(args), Error);
  };
  refuses_backward([&](auto& a) { a.dx = {}; });
  refuses_backward([&](auto& a) { a.dgamma = zeros(Shape{8}, DType::f16); });
  refuses_backward([&](auto& a) { a.dbeta = zeros(Shape{7}, DType::f32); });
  refuses_backward([&](auto& a) { a.sum = zeros(Shape{3, 8}, dtype()); });
}

BITFALL_BACKEND_SUITE(LayerNormTest);

}  // namespace
}  // namespace bitfall::test
