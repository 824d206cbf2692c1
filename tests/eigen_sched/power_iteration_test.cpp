#include "eigen_sched/power_iteration.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <random>

#include "csrc_cpu/cpu_backend.h"

namespace bitfall {
namespace {

using Vector = std::vector<double>;

/// Symmetric matrix [n, n], row-major.
struct Matrix {
  std::size_t n = 0;
  Vector values;

  Vector operator*(const Vector& x) const {
    Vector y(n, 0.0);
    for (std::size_t i = 0; i < n; ++i) {
      for (std::size_t j = 0; j < n; ++j) y[i] += values[i * n + j] * x[j];
    }
    return y;
  }
};

Matrix diagonal(const Vector& eigenvalues) {
  Matrix matrix{eigenvalues.size(), Vector(eigenvalues.size() * eigenvalues.size(), 0.0)};
  for (std::size_t i = 0; i < matrix.n; ++i) matrix.values[i * matrix.n + i] = eigenvalues[i];
  return matrix;
}

/// R D R with the Householder reflection R of a random vector: dense, with known eigenvalues.
Matrix rotated(const Vector& eigenvalues, std::mt19937& random) {
  const std::size_t n = eigenvalues.size();
  std::normal_distribution<double> normal;
  Vector r(n);
  double squared = 0;
  for (double& x : r) {
    x = normal(random);
    squared += x * x;
  }
  Matrix reflection{n, Vector(n * n)};
  for (std::size_t i = 0; i < n; ++i) {
    for (std::size_t j = 0; j < n; ++j) {
      reflection.values[i * n + j] = (i == j ? 1.0 : 0.0) - 2 * r[i] * r[j] / squared;
    }
  }
  Matrix result{n, Vector(n * n)};
  for (std::size_t column = 0; column < n; ++column) {
    Vector e(n, 0.0);
    e[column] = 1;
    Vector x = reflection * e;
    for (std::size_t i = 0; i < n; ++i) x[i] *= eigenvalues[i];
    const Vector y = reflection * x;
    for (std::size_t i = 0; i < n; ++i) result.values[i * n + column] = y[i];
  }
  return result;
}

double inner(const Vector& x, const Vector& y) {
  double sum = 0;
  for (std::size_t i = 0; i < x.size(); ++i) sum += x[i] * y[i];
  return sum;
}

struct PlainResult {
  PowerIterationResult result;
  /// Smallest |relative change - tol| / tol over all iterations: near 0 the rule is a coin toss.
  double margin = std::numeric_limits<double>::infinity();
};

/// The definition: one product per iteration.
PlainResult plain_power_iteration(const Matrix& matrix, Vector u,
                                  const PowerIterationOptions& options) {
  PlainResult plain;
  PowerIterationResult& result = plain.result;
  const double start_norm = std::sqrt(inner(u, u)) + options.stability;
  for (double& x : u) x /= start_norm;
  double lambda = 1, previous = 0;
  while (result.iterations < options.max_iter && lambda != 0) {
    const double change = std::fabs((lambda - previous) / lambda);
    if (result.iterations > 0) {
      plain.margin = std::min(plain.margin, std::fabs(change - options.tol) / options.tol);
    }
    if (change < options.tol) break;
    previous = lambda;
    const Vector h = matrix * u;
    lambda = inner(h, u);
    const double norm = std::sqrt(inner(h, h)) + options.stability;
    for (std::size_t i = 0; i < u.size(); ++i) u[i] = h[i] / norm;
    ++result.iterations;
  }
  result.value = lambda;
  result.converged = lambda == 0 || std::fabs((lambda - previous) / lambda) < options.tol;
  return plain;
}

HessianVectorProduct product_of(const Matrix& matrix) {
  return [&matrix](const Tensor& v, const Tensor& product) {
    const Vector y = matrix * Vector(v.as<float>(), v.as<float>() + v.numel());
    std::copy(y.begin(), y.end(), product.as<float>());
  };
}

Vector random_start(std::size_t n, std::mt19937& random) {
  std::normal_distribution<float> normal;  // f32, so that both sides start from the same numbers
  Vector start(n);
  for (double& x : start) x = normal(random);
  return start;
}

PowerIterationResult krylov(const HessianVectorProduct& product, const Vector& start,
                            const PowerIterationOptions& options) {
  CpuBackend backend;
  std::vector<float> values(start.begin(), start.end());
  const Tensor view{values.data(), DType::f32, Shape{static_cast<std::int64_t>(values.size())}};
  return KrylovPowerIteration(backend, options).run(view, product);
}

TEST(KrylovPowerIteration, FindsDominantEigenvalueWithItsSign) {
  std::mt19937 random(1);
  const Matrix matrix = rotated({-8, 5, 3, 1, 0.5, -0.25, 0}, random);
  const PowerIterationOptions options{.tol = 1e-5};
  const auto result = krylov(product_of(matrix), random_start(7, random), options);
  EXPECT_NEAR(result.value, -8, 1e-3);
  EXPECT_TRUE(result.converged);
}

TEST(KrylovPowerIteration, IdentityEndsAtTheSecondIteration) {
  std::mt19937 random(2);
  const Matrix matrix = diagonal(Vector(20, 3.0));
  const auto result = krylov(product_of(matrix), random_start(20, random), {});
  EXPECT_NEAR(result.value, 3, 1e-5);
  EXPECT_EQ(result.iterations, 2);
  EXPECT_EQ(result.products, 1);  // span{u, H u} has one dimension
}

TEST(KrylovPowerIteration, ZeroMatrixGivesZeroAtOnce) {
  std::mt19937 random(3);
  const auto result = krylov(product_of(diagonal(Vector(9, 0.0))), random_start(9, random), {});
  EXPECT_EQ(result.value, 0);
  EXPECT_EQ(result.iterations, 1);
  EXPECT_TRUE(result.converged);
}

TEST(KrylovPowerIteration, OneDimension) {
  const auto result = krylov(product_of(diagonal({-2.5})), {0.3}, {});
  EXPECT_NEAR(result.value, -2.5, 1e-4);
  EXPECT_EQ(result.products, 1);
}

TEST(KrylovPowerIteration, TinyEigenvaluesNeedNoStability) {
  std::mt19937 random(4);
  const Matrix matrix = rotated({1e-12, 2e-13, -1e-13, 1e-14}, random);
  const PowerIterationOptions options{.tol = 1e-3, .stability = 0};
  const auto result = krylov(product_of(matrix), random_start(4, random), options);
  EXPECT_NEAR(result.value, 1e-12, 1e-15);
}

TEST(KrylovPowerIteration, FollowsTheStabilityOfSmallEigenvalues) {
  std::mt19937 random(5);
  const Matrix matrix = rotated({1e-5, 3e-6, -1e-6, 1e-7}, random);
  const Vector start = random_start(4, random);
  const auto plain = plain_power_iteration(matrix, start, {}).result;
  const auto result = krylov(product_of(matrix), start, {});
  EXPECT_NEAR(result.value, plain.value, 1e-3 * plain.value);
  EXPECT_LT(result.value, 0.9e-5);  // stability 1e-6 damps it visibly
}

TEST(KrylovPowerIteration, ClusteredTopTakesFewProducts) {
  std::mt19937 random(6);
  Vector eigenvalues(60);
  for (std::size_t i = 0; i < 60; ++i) eigenvalues[i] = 0.5 * static_cast<double>(i) / 60;
  eigenvalues[0] = 1.0;
  eigenvalues[1] = 0.97;
  eigenvalues[2] = -0.94;
  const Matrix matrix = rotated(eigenvalues, random);
  const Vector start = random_start(60, random);
  const PowerIterationOptions options{.tol = 1e-4};
  const auto plain = plain_power_iteration(matrix, start, options).result;
  const auto result = krylov(product_of(matrix), start, options);
  EXPECT_GT(plain.iterations, 20);
  EXPECT_EQ(result.iterations, plain.iterations);
  EXPECT_NEAR(result.value, plain.value, 1e-5);
  EXPECT_LT(2 * result.products, plain.iterations);
}

TEST(KrylovPowerIteration, StopsAtMaxIterUnconverged) {
  std::mt19937 random(7);
  std::normal_distribution<double> normal;
  Vector eigenvalues(40);
  for (double& x : eigenvalues) x = normal(random);
  const Matrix matrix = rotated(eigenvalues, random);
  const Vector start = random_start(40, random);
  for (int max_iter = 1; max_iter <= 5; ++max_iter) {
    const PowerIterationOptions options{.max_iter = max_iter, .tol = 1e-6};
    const auto plain = plain_power_iteration(matrix, start, options).result;
    const auto result = krylov(product_of(matrix), start, options);
    EXPECT_EQ(result.iterations, max_iter);
    EXPECT_FALSE(result.converged);
    EXPECT_LE(result.products, max_iter);
    EXPECT_NEAR(result.value, plain.value, 1e-5 * std::fabs(plain.value) + 1e-6);
  }
}

TEST(KrylovPowerIteration, NonFiniteProductGivesNaN) {
  std::mt19937 random(8);
  const Matrix matrix = rotated({4, 3, 2, 1}, random);
  for (const float bad :
       {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
    int calls = 0;
    const auto product = [&](const Tensor& v, const Tensor& out) {
      product_of(matrix)(v, out);
      if (++calls == 2) out.as<float>()[3] = bad;
    };
    const auto result = krylov(product, random_start(4, random), {});
    EXPECT_TRUE(std::isnan(result.value));
    EXPECT_FALSE(result.converged);
    EXPECT_EQ(result.products, 2);
  }
}

TEST(KrylovPowerIteration, RunsOfDifferentSizesShareTheBasis) {
  std::mt19937 random(9);
  CpuBackend backend;
  KrylovPowerIteration iteration(backend, {.tol = 1e-5});
  for (const std::size_t n : {3, 30, 5}) {
    Vector eigenvalues(n, 0.5);
    eigenvalues[n / 2] = 2.0 + static_cast<double>(n);
    const Matrix matrix = rotated(eigenvalues, random);
    const Vector start = random_start(n, random);
    std::vector<float> values(start.begin(), start.end());
    const Tensor view{values.data(), DType::f32, Shape{static_cast<std::int64_t>(n)}};
    EXPECT_NEAR(iteration.run(view, product_of(matrix)).value, 2.0 + static_cast<double>(n), 1e-3);
  }
}

/// Draws spectra of the kind named by the parameter.
Vector draw_spectrum(const std::string& kind, std::size_t n, std::mt19937& random) {
  std::normal_distribution<double> normal;
  std::cauchy_distribution<double> cauchy;
  std::uniform_real_distribution<double> uniform;
  const double decay = 0.3 + 1.7 * uniform(random);
  Vector eigenvalues(n);
  for (std::size_t i = 0; i < n; ++i) {
    const double place = static_cast<double>(i + 1);
    if (kind == "normal") eigenvalues[i] = normal(random);
    if (kind == "heavy_tailed") eigenvalues[i] = cauchy(random);
    if (kind == "decaying") {
      eigenvalues[i] = (uniform(random) < 0.2 ? -1 : 1) * std::pow(place, -decay);
    }
    if (kind == "indefinite") {
      eigenvalues[i] = 2 * place / static_cast<double>(n) - 1 + 0.01 * normal(random);
    }
  }
  return eigenvalues;
}

class RandomSpectra : public testing::TestWithParam<std::string> {};

TEST_P(RandomSpectra, EqualsPlainPowerIteration) {
  std::mt19937 random(10);
  int products = 0, iterations = 0;
  for (int repeat = 0; repeat < 60; ++repeat) {
    const std::size_t n = 4 + random() % 90;
    const Matrix matrix = rotated(draw_spectrum(GetParam(), n, random), random);
    const Vector start = random_start(n, random);
    const PlainResult plain = plain_power_iteration(matrix, start, {});
    const auto result = krylov(product_of(matrix), start, {});
    SCOPED_TRACE(concat("repeat ", repeat, ", n ", n, ", margin ", plain.margin));
    EXPECT_NEAR(result.value, plain.result.value, 1e-3 * std::fabs(plain.result.value));
    if (plain.margin > 0.02) {
      EXPECT_EQ(result.iterations, plain.result.iterations);
      EXPECT_EQ(result.converged, plain.result.converged);
    }
    products += result.products;
    iterations += plain.result.iterations;
  }
  EXPECT_LT(products, iterations);
}

INSTANTIATE_TEST_SUITE_P(Kinds, RandomSpectra,
                         testing::Values("normal", "heavy_tailed", "decaying", "indefinite"),
                         [](const auto& info) { return info.param; });

}  // namespace
}  // namespace bitfall
