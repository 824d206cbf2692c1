#include <cmath>

#include "tests/support/backend_fixture.h"
#include "tests/support/numeric_gradient.h"

namespace bitfall::test {
namespace {

using Values = std::vector<double>;

/// -log softmax(logits)[target] over every `stride`-th of `count` logits from `first`.
double negative_log_likelihood(const Values& logits, std::size_t first, std::size_t stride,
                               std::size_t count, std::int32_t target) {
  double sum = 0;
  for (std::size_t i = 0; i < count; ++i) sum += std::exp(logits[first + i * stride]);
  return std::log(sum) - logits[first + static_cast<std::size_t>(target) * stride];
}

/// Gradient of `scale` times that, added to dlogits.
void add_gradient(const Values& logits, std::size_t first, std::size_t stride, std::size_t count,
                  std::int32_t target, double scale, Values& dlogits) {
  const double loss = negative_log_likelihood(logits, first, stride, count, target);
  const double of_target = logits[first + static_cast<std::size_t>(target) * stride];
  for (std::size_t i = 0; i < count; ++i) {
    const std::size_t at = first + i * stride;
    const bool is_target = static_cast<std::int32_t>(i) == target;
    dlogits[at] += scale * (std::exp(logits[at] - of_target - loss) - (is_target ? 1 : 0));
  }
}

class LossTest : public BackendTest {
 protected:
  Tensor loss_ = zeros(Shape{1}, DType::f32);

  /// `loss_` against the reference, and the gradient of `scale` times it.
  void expect_loss(const std::function<double(const Values&)>& reference, const Tensor& logits,
                   const Tensor& dlogits, double scale) {
    EXPECT_NEAR(loss_.as<float>()[0], reference(values(logits)), 1e-5);
    Values gradient = numeric_gradient(reference, values(logits));
    for (double& value : gradient) value *= scale;
    EXPECT_TRUE(close(dlogits, gradient, tolerance()));
  }
};

TEST_P(LossTest, CrossEntropy) {
  for (const Shape& shape : {Shape{1, 1}, Shape{3, 2}, Shape{130, 3}, Shape{2, 33}}) {
    const Tensor logits = random(shape, dtype(), 2.0), dlogits = zeros(shape, dtype());
    std::vector<std::int32_t> label;
    for (std::int32_t row = 0; row < shape[0]; ++row)
      label.push_back(row % static_cast<std::int32_t>(shape[1]));
    const Tensor labels = integers(Shape{shape[0]}, label);
    backend().cross_entropy_forward(logits, labels, loss_);
    backend().cross_entropy_backward(logits, labels, 8.0f, dlogits);
    const auto classes = static_cast<std::size_t>(shape[1]);
    const auto reference = [&](const Values& z) {
      double sum = 0;
      for (std::size_t row = 0; row < label.size(); ++row)
        sum += negative_log_likelihood(z, row * classes, 1, classes, label[row]);
      return sum / double(label.size());
    };
    expect_loss(reference, logits, dlogits, 8.0);
  }
}

TEST_P(LossTest, CrossEntropyOfLargeLogitsIsFinite) {
  const Tensor logits = floats(Shape{1, 2}, dtype(), {30000, -30000});
  const Tensor dlogits = zeros(Shape{1, 2}, dtype()), labels = integers(Shape{1}, {1});
  backend().cross_entropy_forward(logits, labels, loss_);
  backend().cross_entropy_backward(logits, labels, 1.0f, dlogits);
  EXPECT_NEAR(loss_.as<float>()[0], 60000, 600);
  EXPECT_EQ(values(dlogits), (Values{1, -1}));
}

TEST_P(LossTest, MeanSquaredError) {
  const Tensor predictions = random(Shape{13, 1}, dtype()), labels = random(Shape{13}, DType::f32);
  const Tensor dpredictions = zeros(Shape{13, 1}, dtype());
  backend().mean_squared_error_forward(predictions, labels, loss_);
  backend().mean_squared_error_backward(predictions, labels, 0.5f, dpredictions);
  const auto reference = [&](const Values& p) {
    double sum = 0;
    for (std::size_t i = 0; i < p.size(); ++i) sum += std::pow(p[i] - values(labels)[i], 2);
    return sum / double(p.size());
  };
  expect_loss(reference, predictions, dpredictions, 0.5);
}

TEST_P(LossTest, SpanCrossEntropy) {
  const Tensor logits = random(Shape{10, 2}, dtype()), dlogits = zeros(Shape{10, 2}, dtype());
  const Tensor starts = integers(Shape{4}, {0, 1, 4, 10});
  const std::vector<std::int32_t> span{0, 0, 2, 1, 3, 5};
  const Tensor positions = integers(Shape{3, 2}, span);
  backend().span_cross_entropy_forward(logits, starts, positions, loss_);
  backend().span_cross_entropy_backward(logits, starts, positions, 2.0f, dlogits);
  const auto reference = [&](const Values& z) {
    const std::size_t begin[] = {0, 1, 4, 10};
    double sum = 0;
    for (std::size_t s = 0; s < 3; ++s) {
      for (std::size_t end = 0; end < 2; ++end)
        sum += negative_log_likelihood(z, 2 * begin[s] + end, 2, begin[s + 1] - begin[s],
                                       span[2 * s + end]);
    }
    return sum / 6;
  };
  expect_loss(reference, logits, dlogits, 2.0);
}

TEST_P(LossTest, CrossEntropyTangentIsTheDerivativeOfTheGradient) {
  for (const Shape& shape : {Shape{1, 1}, Shape{3, 2}, Shape{130, 3}, Shape{2, 33}}) {
    const Tensor logits = random(shape, dtype(), 2.0), tangent = random(shape, dtype());
    const Tensor dlogits_tangent = zeros(shape, dtype());
    backend().cross_entropy_backward_tangent(logits, tangent, 8.0f, dlogits_tangent);
    const auto rows = static_cast<std::size_t>(shape[0]),
               classes = static_cast<std::size_t>(shape[1]);
    const auto gradient = [&](const Values& z) {
      Values dlogits(z.size(), 0.0);
      for (std::size_t row = 0; row < rows; ++row)
        add_gradient(z, row * classes, 1, classes, 0, 8.0 / double(rows), dlogits);
      return dlogits;
    };
    EXPECT_TRUE(close(dlogits_tangent, numeric_tangent(gradient, values(logits), values(tangent)),
                      tolerance()))
        << shape.to_string();
  }
}

TEST_P(LossTest, SpanCrossEntropyTangentIsTheDerivativeOfTheGradient) {
  const Tensor logits = random(Shape{10, 2}, dtype()), tangent = random(Shape{10, 2}, dtype());
  const Tensor dlogits_tangent = zeros(Shape{10, 2}, dtype());
  const std::vector<std::int32_t> begin{0, 1, 4, 10};
  backend().span_cross_entropy_backward_tangent(logits, tangent, integers(Shape{4}, begin), 2.0f,
                                                dlogits_tangent);
  const auto gradient = [&](const Values& z) {
    Values dlogits(z.size(), 0.0);
    for (std::size_t s = 0; s < 3; ++s) {
      const auto first = static_cast<std::size_t>(begin[s]);
      const auto count = static_cast<std::size_t>(begin[s + 1] - begin[s]);
      for (std::size_t end = 0; end < 2; ++end)
        add_gradient(z, 2 * first + end, 2, count, 0, 2.0 / 6, dlogits);
    }
    return dlogits;
  };
  EXPECT_TRUE(close(dlogits_tangent, numeric_tangent(gradient, values(logits), values(tangent)),
                    tolerance()));
}

TEST_P(LossTest, TangentsRefuseWhatDoesNotFit) {
  Backend& b = backend();
  const Tensor good = zeros(Shape{4, 2}, dtype()), other = zeros(Shape{2, 4}, dtype());
  const Tensor half = zeros(Shape{4, 2}, DType::s8), none = zeros(Shape{0, 2}, dtype());
  const Tensor starts = integers(Shape{3}, {0, 1, 4});
  EXPECT_NO_THROW(b.cross_entropy_backward_tangent(good, good, 1, good));
  EXPECT_THROW(b.cross_entropy_backward_tangent(good, other, 1, good), ShapeError);
  EXPECT_THROW(b.cross_entropy_backward_tangent(good, good, 1, other), ShapeError);
  EXPECT_THROW(b.cross_entropy_backward_tangent(none, none, 1, none), ShapeError);
  EXPECT_THROW(b.cross_entropy_backward_tangent(good, half, 1, good), UnsupportedError);
  const auto span = [&](const Tensor& logits, const Tensor& tangent, const Tensor& sequences,
                        const Tensor& result) {
    b.span_cross_entropy_backward_tangent(logits, tangent, sequences, 1, result);
  };
  EXPECT_NO_THROW(span(good, good, starts, good));
  EXPECT_THROW(span(other, other, starts, other), ShapeError);
  EXPECT_THROW(span(good, other, starts, good), ShapeError);
  EXPECT_THROW(span(good, good, starts, other), ShapeError);
  EXPECT_THROW(span(good, good, integers(Shape{1}, {0}), good), ShapeError);
  EXPECT_THROW(span(good, half, starts, good), UnsupportedError);
  for (const auto& bad : {std::vector<std::int32_t>{0, 1, 5}, {0, 4, 4}}) {
    const auto refused = [&] { span(good, good, integers(Shape{3}, bad), good); };
    if (checks_content()) {
      EXPECT_THROW(refused(), ShapeError);
    } else {
      EXPECT_NO_THROW(refused());
    }
  }
}

TEST_P(LossTest, NanLogitsGiveANanLoss) {
  const Tensor logits = floats(Shape{1, 2}, dtype(), {NAN, 1});
  backend().cross_entropy_forward(logits, integers(Shape{1}, {1}), loss_);
  EXPECT_TRUE(std::isnan(loss_.as<float>()[0]));
}

TEST_P(LossTest, RefusesWhatDoesNotFit) {
  Backend& b = backend();
  const Tensor logits = zeros(Shape{2, 3}, dtype()), labels = integers(Shape{2}, {0, 2});
  EXPECT_THROW(b.cross_entropy_forward(logits, integers(Shape{3}, {0, 0, 0}), loss_), ShapeError);
  EXPECT_THROW(
      b.cross_entropy_forward(zeros(Shape{0, 3}, dtype()), zeros(Shape{0}, DType::s32), loss_),
      ShapeError);
  EXPECT_THROW(b.cross_entropy_forward(logits, labels, zeros(Shape{2}, DType::f32)), ShapeError);
  EXPECT_THROW(b.cross_entropy_backward(logits, labels, 1, zeros(Shape{3, 2}, dtype())),
               ShapeError);
  EXPECT_THROW(b.mean_squared_error_forward(logits, zeros(Shape{2}, DType::f32), loss_),
               ShapeError);
  EXPECT_THROW(b.mean_squared_error_forward(zeros(Shape{2, 1}, dtype()), labels, loss_),
               UnsupportedError);
  const Tensor tokens = zeros(Shape{4, 2}, dtype()), starts = integers(Shape{3}, {0, 1, 4});
  const Tensor good = integers(Shape{2, 2}, {0, 0, 1, 2});
  EXPECT_THROW(b.span_cross_entropy_forward(logits, starts, good, loss_), ShapeError);
  b.span_cross_entropy_forward(tokens, starts, good, loss_);
}

/// Where the content of tensors is not looked at, the fault must show in the loss.
TEST_P(LossTest, TargetsOutsideAreRefusedOrGiveNan) {
  const auto refused_or_nan = [&](const auto& forward) {
    loss_.as<float>()[0] = 0;
    if (checks_content()) {
      EXPECT_THROW(forward(), ShapeError);
    } else {
      forward();
      EXPECT_TRUE(std::isnan(loss_.as<float>()[0]));
    }
  };
  const Tensor logits = zeros(Shape{2, 3}, dtype());
  for (const std::int32_t bad : {3, -1}) {
    const Tensor labels = integers(Shape{2}, {0, bad});
    refused_or_nan([&] { backend().cross_entropy_forward(logits, labels, loss_); });
  }
  const Tensor tokens = zeros(Shape{4, 2}, dtype());
  const Tensor starts = integers(Shape{3}, {0, 1, 4}), good = integers(Shape{2, 2}, {0, 0, 1, 2});
  const Tensor outside = integers(Shape{2, 2}, {0, 1, 1, 2});
  const auto forward = [&](const Tensor& sequence_starts, const Tensor& positions) {
    backend().span_cross_entropy_forward(tokens, sequence_starts, positions, loss_);
  };
  refused_or_nan([&] { forward(starts, outside); });
  for (const auto& bad : {std::vector<std::int32_t>{0, 1, 5}, {0, 4, 4}})
    refused_or_nan([&] { forward(integers(Shape{3}, bad), good); });
}

BITFALL_BACKEND_SUITE(LossTest);

}  // namespace
}  // namespace bitfall::test
