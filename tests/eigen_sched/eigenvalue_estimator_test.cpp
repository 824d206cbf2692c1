#include "eigen_sched/eigenvalue_estimator.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "csrc_cpu/cpu_backend.h"

namespace bitfall {
namespace {

using testing::Each;
using testing::ElementsAre;

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr double kInfinity = std::numeric_limits<double>::infinity();

std::vector<double> normalize(std::vector<double> eigenvalues) {
  return normalize_eigenvalues(eigenvalues);
}

TEST(NormalizeEigenvalues, DividesByTheLargestMagnitude) {
  EXPECT_THAT(normalize({1.0, -4.0, 2.0}), ElementsAre(0.25, 1.0, 0.5));
}

TEST(NormalizeEigenvalues, NonFiniteTakesTheLargestFiniteOfTheOthers) {
  EXPECT_THAT(normalize({1.0, kNaN, -4.0, kInfinity, -kInfinity}),
              ElementsAre(0.25, 1.0, 1.0, 1.0, 1.0));
}

TEST(NormalizeEigenvalues, AllNonFiniteGivesOnes) {
  EXPECT_THAT(normalize({kNaN, kInfinity, kNaN}), Each(1.0));
}

TEST(NormalizeEigenvalues, ExactZeroGivesOne) {
  EXPECT_THAT(normalize({0.0, 3.0, 1.5, -0.0}), ElementsAre(1.0, 1.0, 0.5, 1.0));
  EXPECT_THAT(normalize({0.0, 0.0}), Each(1.0));
  EXPECT_THAT(normalize({0.0, kNaN}), Each(1.0));
}

TEST(NormalizeEigenvalues, NoBlocksGiveNothing) { EXPECT_TRUE(normalize({}).empty()); }

TEST(EigenvalueFactor, HasItsStepsAtQuarters) {
  EXPECT_EQ(eigenvalue_factor(0.0), 1);
  EXPECT_EQ(eigenvalue_factor(0.2499), 1);
  EXPECT_EQ(eigenvalue_factor(0.25), 2);
  EXPECT_EQ(eigenvalue_factor(0.5), 3);
  EXPECT_EQ(eigenvalue_factor(0.75), 4);
  EXPECT_EQ(eigenvalue_factor(0.9999), 4);
  EXPECT_EQ(eigenvalue_factor(1.0), 5);
}

std::vector<float> start_vector(const StartVectorKey& key, std::size_t n) {
  std::vector<float> values(n);
  fill_start_vector(key, values);
  return values;
}

TEST(StartVector, HasMeanZeroVarianceOneAndLightTails) {
  const std::size_t n = 200001;  // odd: the last element is filled alone
  const std::vector<float> values = start_vector({.seed = 7, .step = 3, .block = 1}, n);
  double sum = 0, squares = 0, fourth = 0, neighbours = 0;
  for (std::size_t i = 0; i < n; ++i) {
    const double x = values[i];
    sum += x;
    squares += x * x;
    fourth += x * x * x * x;
    if (i > 0) neighbours += x * values[i - 1];
  }
  const double count = static_cast<double>(n);
  EXPECT_NEAR(sum / count, 0, 0.01);
  EXPECT_NEAR(squares / count, 1, 0.01);
  EXPECT_NEAR(fourth / count, 2.7, 0.05);  // Irwin-Hall of four: 3 - 6/5/4
  EXPECT_NEAR(neighbours / count, 0, 0.01);
  EXPECT_NE(values.back(), 0.0f);
}

TEST(StartVector, IsAFunctionOfSeedStepAndBlock) {
  const std::vector<float> base = start_vector({.seed = 1, .step = 2, .block = 3}, 64);
  EXPECT_EQ(base, start_vector({.seed = 1, .step = 2, .block = 3}, 64));
  EXPECT_NE(base, start_vector({.seed = 2, .step = 2, .block = 3}, 64));
  EXPECT_NE(base, start_vector({.seed = 1ull << 32, .step = 2, .block = 3}, 64));
  EXPECT_NE(base, start_vector({.seed = 1, .step = 4, .block = 3}, 64));
  EXPECT_NE(base, start_vector({.seed = 1, .step = 2, .block = 0}, 64));
  const std::vector<float> longer = start_vector({.seed = 1, .step = 2, .block = 3}, 100);
  EXPECT_TRUE(std::equal(base.begin(), base.end(), longer.begin()));
}

TEST(EigenvalueEstimator, FindsTheDominantEigenvalueOfEachBlock) {
  CpuBackend backend;
  EigenvalueEstimator estimator(backend, {.tol = 1e-4});
  for (const float dominant : {5.0f, -7.0f}) {
    // H = dominant * e e^T / n with e all ones.
    const auto product = [dominant](const Tensor& v, const Tensor& out) {
      double sum = 0;
      for (std::int64_t i = 0; i < v.numel(); ++i) sum += v.as<float>()[i];
      const double element = dominant * sum / static_cast<double>(v.numel());
      std::fill_n(out.as<float>(), v.numel(), static_cast<float>(element));
    };
    const auto result = estimator.estimate({.seed = 11, .step = 0, .block = 0}, 101, product);
    EXPECT_NEAR(result.value, dominant, 1e-3);
    EXPECT_TRUE(result.converged);
  }
}

}  // namespace
}  // namespace bitfall
