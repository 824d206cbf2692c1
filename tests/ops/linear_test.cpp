#include <cmath>

#include "tests/support/backend_fixture.h"
#include "tests/support/numeric_gradient.h"

namespace bitfall::test {
namespace {

struct Sizes {
  std::int64_t rows, n, k;
};

/// Odd sizes, one row, more than one piece of rows, and enough rows for packed weights.
constexpr Sizes kSizes[] = {{1, 1, 1},    {3, 5, 7},    {1, 2, 384},
                            {130, 33, 7}, {131, 7, 65}, {300, 48, 33}};

/// c [m, n] = a b, where a(i, l) and b(l, j) read elements.
template <typename A, typename B>
std::vector<double> product(std::int64_t m, std::int64_t n, std::int64_t k, A a, B b) {
  std::vector<double> c(static_cast<std::size_t>(m * n));
  for (std::int64_t i = 0; i < m; ++i) {
    for (std::int64_t j = 0; j < n; ++j) {
      double sum = 0;
      for (std::int64_t l = 0; l < k; ++l) sum += a(i, l) * b(l, j);
      c[static_cast<std::size_t>(i * n + j)] = sum;
    }
  }
  return c;
}

/// Element (row, column) of a matrix of `columns` columns.
struct Matrix {
  std::vector<double> data;
  std::int64_t columns;

  explicit Matrix(const Tensor& tensor) : data(values(tensor)), columns(tensor.shape[1]) {}
  double operator()(std::int64_t row, std::int64_t column) const {
    return data[static_cast<std::size_t>(row * columns + column)];
  }
};

class LinearTest : public BackendTest {
 protected:
  std::vector<double> forward_reference(const Tensor& x, const Tensor& weight, const Tensor& bias) {
    const Matrix a(x), w(weight);
    std::vector<double> y = product(x.shape[0], weight.shape[0], x.shape[1], a,
                                    [&](std::int64_t l, std::int64_t j) { return w(j, l); });
    for (std::size_t i = 0; i < y.size() && bias; ++i)
      y[i] += values(bias)[i % static_cast<std::size_t>(weight.shape[0])];
    return y;
  }
};

TEST_P(LinearTest, ForwardMatchesReference) {
  for (const Sizes& s : kSizes) {
    const Tensor x = random(Shape{s.rows, s.k}, dtype());
    const Tensor weight = random(Shape{s.n, s.k}, dtype(), 1 / std::sqrt(double(s.k)));
    const Tensor bias = random(Shape{s.n}, dtype()), y = zeros(Shape{s.rows, s.n}, dtype());
    backend().linear_forward(x, weight, bias, y, Accumulate::no);
    EXPECT_TRUE(close(y, forward_reference(x, weight, bias), tolerance())) << s.rows << " " << s.k;
    backend().linear_forward(x, weight, {}, y, Accumulate::no);
    EXPECT_TRUE(close(y, forward_reference(x, weight, {}), tolerance())) << s.rows << " " << s.k;
  }
}

TEST_P(LinearTest, ForwardAccumulates) {
  for (const Sizes& s : kSizes) {
    const Tensor x = random(Shape{s.rows, s.k}, dtype());
    const Tensor weight = random(Shape{s.n, s.k}, dtype(), 1 / std::sqrt(double(s.k)));
    const Tensor y = random(Shape{s.rows, s.n}, dtype());
    for (const Tensor& bias : {random(Shape{s.n}, dtype()), Tensor{}}) {
      std::vector<double> expected = forward_reference(x, weight, bias);
      const std::vector<double> before = values(y);
      for (std::size_t i = 0; i < expected.size(); ++i) expected[i] += before[i];
      backend().linear_forward(x, weight, bias, y, Accumulate::yes);
      EXPECT_TRUE(close(y, expected, tolerance())) << s.rows << " " << s.n << " " << s.k;
    }
  }
}

TEST_P(LinearTest, TakesABiasFromAnyAddress) {
  const Tensor x = random(Shape{6, 9}, dtype()), weight = random(Shape{8, 9}, dtype(), 1.0 / 3);
  const Tensor biases = random(Shape{11}, dtype()), y = zeros(Shape{6, 8}, dtype());
  for (const std::int64_t begin : {0, 1, 2, 3}) {
    const Tensor bias = biases.flat_slice(begin, 8);
    backend().linear_forward(x, weight, bias, y, Accumulate::no);
    EXPECT_TRUE(close(y, forward_reference(x, weight, bias), tolerance())) << begin;
  }
}

TEST_P(LinearTest, ActivationFollowsTheStoredPreActivation) {
  for (const Sizes& s : kSizes) {
    const Tensor x = random(Shape{s.rows, s.k}, dtype());
    const Tensor weight = random(Shape{s.n, s.k}, dtype(), 1 / std::sqrt(double(s.k)));
    const Tensor bias = random(Shape{s.n}, dtype());
    const Shape shape{s.rows, s.n};
    const Tensor pre = zeros(shape, dtype()), y = zeros(shape, dtype());
    backend().linear_activation_forward(x, weight, bias, Activation::gelu, pre, y);
    EXPECT_TRUE(close(pre, forward_reference(x, weight, bias), tolerance()));
    // activation_backward repeats the activation of what was stored, bit for bit.
    const Tensor again = zeros(shape, dtype());
    backend().activation_backward(Activation::gelu, pre, y, zeros(shape, dtype()), again);
    EXPECT_TRUE(identical(y, again));
  }
}

TEST_P(LinearTest, BackwardInputMatchesReferenceAndAccumulates) {
  for (const Sizes& s : kSizes) {
    const Tensor dy = random(Shape{s.rows, s.n}, dtype());
    const Tensor weight = random(Shape{s.n, s.k}, dtype(), 1 / std::sqrt(double(s.n)));
    const Tensor dx = random(Shape{s.rows, s.k}, dtype());
    std::vector<double> expected = product(s.rows, s.k, s.n, Matrix(dy), Matrix(weight));
    backend().linear_backward_input(dy, weight, dx, Accumulate::no);
    EXPECT_TRUE(close(dx, expected, tolerance()));
    const std::vector<double> before = values(dx);
    backend().linear_backward_input(dy, weight, dx, Accumulate::yes);
    for (std::size_t i = 0; i < expected.size(); ++i) expected[i] += before[i];
    EXPECT_TRUE(close(dx, expected, tolerance()));
  }
}

TEST_P(LinearTest, BackwardWeightMatchesReferenceAndAccumulates) {
  for (const Sizes& s : kSizes) {
    const Tensor dy = random(Shape{s.rows, s.n}, dtype()), x = random(Shape{s.rows, s.k}, dtype());
    const Tensor dweight = random(Shape{s.n, s.k}, DType::f32),
                 dbias = random(Shape{s.n}, DType::f32);
    const Matrix gradient(dy);
    const auto transposed = [&](std::int64_t i, std::int64_t l) { return gradient(l, i); };
    std::vector<double> weight_expected = product(s.n, s.k, s.rows, transposed, Matrix(x));
    std::vector<double> bias_expected =
        product(s.n, 1, s.rows, transposed, [](std::int64_t, std::int64_t) { return 1.0; });
    // Sums in f32 whatever the compute dtype; they grow with the root of the rows.
    const Tolerance allowed{2e-4, 2e-5};
    backend().linear_backward_weight(dy, x, dweight, dbias, Accumulate::no);
    EXPECT_TRUE(close(dweight, weight_expected, allowed)) << s.rows << " " << s.n << " " << s.k;
    EXPECT_TRUE(close(dbias, bias_expected, allowed));
    backend().linear_backward_weight(dy, x, dweight, dbias, Accumulate::yes);
    for (double& value : weight_expected) value *= 2;
    for (double& value : bias_expected) value *= 2;
    EXPECT_TRUE(close(dweight, weight_expected, allowed));
    EXPECT_TRUE(close(dbias, bias_expected, allowed));
  }
}

TEST_P(LinearTest, TwoRunsGiveTheSameBits) {
  const Tensor x = random(Shape{300, 65}, dtype()), weight = random(Shape{48, 65}, dtype());
  const Tensor y = zeros(Shape{300, 48}, dtype()), again = zeros(Shape{300, 48}, dtype());
  backend().linear_forward(x, weight, {}, y, Accumulate::no);
  backend().linear_forward(x, weight, {}, again, Accumulate::no);
  EXPECT_TRUE(identical(y, again));
  const Tensor dw = zeros(weight.shape, DType::f32), dw_again = zeros(weight.shape, DType::f32);
  const Tensor db = zeros(Shape{48}, DType::f32), db_again = zeros(Shape{48}, DType::f32);
  backend().linear_backward_weight(y, x, dw, db, Accumulate::no);
  backend().linear_backward_weight(y, x, dw_again, db_again, Accumulate::no);
  EXPECT_TRUE(identical(dw, dw_again));
  EXPECT_TRUE(identical(db, db_again));
}

TEST_P(LinearTest, NoRowsGiveNothingForwardAndZeroGradients) {
  const Tensor x = zeros(Shape{0, 4}, dtype()), y = zeros(Shape{0, 3}, dtype());
  const Tensor weight = random(Shape{3, 4}, dtype());
  backend().linear_forward(x, weight, {}, y, Accumulate::no);
  backend().linear_backward_input(y, weight, x, Accumulate::no);
  const Tensor dweight = random(Shape{3, 4}, DType::f32), dbias = random(Shape{3}, DType::f32);
  const std::vector<double> before = values(dweight);
  backend().linear_backward_weight(y, x, dweight, dbias, Accumulate::yes);
  EXPECT_EQ(values(dweight), before);
  backend().linear_backward_weight(y, x, dweight, dbias, Accumulate::no);
  EXPECT_EQ(values(dweight), std::vector<double>(12, 0.0));
  EXPECT_EQ(values(dbias), std::vector<double>(3, 0.0));
}

TEST_P(LinearTest, RefusesWhatDoesNotFit) {
  const Tensor x = zeros(Shape{2, 4}, dtype()), weight = zeros(Shape{3, 4}, dtype());
  const Tensor y = zeros(Shape{2, 3}, dtype()), bad = zeros(Shape{2, 5}, dtype());
  const Tensor bias = zeros(Shape{3}, dtype()), flat = zeros(Shape{8}, dtype());
  const Tensor dweight = zeros(Shape{3, 4}, DType::f32);
  const Tensor integers = zeros(Shape{2, 4}, DType::s32);
  Backend& b = backend();
  EXPECT_THROW(b.linear_forward(bad, weight, bias, y, Accumulate::no), ShapeError);
  EXPECT_THROW(b.linear_forward(flat, weight, bias, y, Accumulate::no), ShapeError);
  EXPECT_THROW(b.linear_forward(x, weight, flat, y, Accumulate::no), ShapeError);
  EXPECT_THROW(b.linear_forward(x, weight, bias, {}, Accumulate::yes), ShapeError);
  EXPECT_THROW(b.linear_forward(x, bad, bias, y, Accumulate::no), ShapeError);
  EXPECT_THROW(b.linear_forward(integers, weight, bias, y, Accumulate::no), UnsupportedError);
  EXPECT_THROW(b.linear_forward(x, dweight.reshaped(Shape{3, 4}), bias,
                                zeros(Shape{2, 3}, DType::s8), Accumulate::no),
               UnsupportedError);
  EXPECT_THROW(b.linear_activation_forward(x, weight, bias, Activation::gelu, y, bad), ShapeError);
  EXPECT_THROW(b.linear_backward_input(bad, weight, x, Accumulate::no), ShapeError);
  EXPECT_THROW(b.linear_backward_weight(y, x, bad, {}, Accumulate::no), ShapeError);
  EXPECT_THROW(b.linear_backward_weight(y, x, dweight, flat, Accumulate::no), ShapeError);
  const Tensor half = zeros(Shape{3, 4}, DType::f16);
  EXPECT_THROW(b.linear_backward_weight(y, x, half, {}, Accumulate::no), UnsupportedError);
}

BITFALL_BACKEND_SUITE(LinearTest);

}  // namespace
}  // namespace bitfall::test
