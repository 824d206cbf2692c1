#include "eigen_sched/hessian_vector.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <stdexcept>
#include <vector>

#include "csrc_cpu/cpu_backend.h"

namespace bitfall {
namespace {

/// f(w) = sum_i cosh(a_i . w) over rows a_i: gradient sum_i sinh(a_i . w) a_i, Hessian
/// sum_i cosh(a_i . w) a_i a_i^T.
class CoshModel {
 public:
  static constexpr std::int64_t kSize = 6;

  CoshModel() {
    for (std::size_t i = 0; i < rows_.size(); ++i) rows_[i] = std::sin(1.7 * (1.0 + double(i)));
    for (std::size_t i = 0; i < kSize; ++i) weights_[i] = 0.2f * static_cast<float>(i) - 0.3f;
  }

  Tensor weights() { return {weights_.data(), DType::f32, Shape{kSize}}; }
  int gradients() const { return gradients_; }

  GradientFunction gradient() {
    return [this] {
      ++gradients_;
      accumulate([](double t) { return std::sinh(t); }, weights_, gradient_);
      return Tensor{gradient_.data(), DType::f32, Shape{kSize}};
    };
  }

  std::vector<double> exact_product(const std::vector<float>& v) {
    std::vector<double> product(kSize, 0.0);
    for (std::size_t i = 0; i < kSize; ++i) {
      const double curvature = std::cosh(row_dot(i, weights_)) * row_dot(i, v);
      for (std::size_t j = 0; j < kSize; ++j) product[j] += curvature * rows_[i * kSize + j];
    }
    return product;
  }

 private:
  double row_dot(std::size_t row, const std::vector<float>& x) const {
    double sum = 0;
    for (std::size_t j = 0; j < kSize; ++j) sum += rows_[row * kSize + j] * x[j];
    return sum;
  }

  template <typename Function>
  void accumulate(Function&& function, const std::vector<float>& at, std::vector<float>& out) {
    std::vector<double> sum(kSize, 0.0);
    for (std::size_t i = 0; i < kSize; ++i) {
      const double factor = function(row_dot(i, at));
      for (std::size_t j = 0; j < kSize; ++j) sum[j] += factor * rows_[i * kSize + j];
    }
    for (std::size_t j = 0; j < kSize; ++j) out[j] = static_cast<float>(sum[j]);
  }

  std::vector<double> rows_ = std::vector<double>(kSize * kSize);
  std::vector<float> weights_ = std::vector<float>(kSize);
  std::vector<float> gradient_ = std::vector<float>(kSize);
  int gradients_ = 0;
};

std::vector<float> unit_vector(double phase) {
  std::vector<float> v(CoshModel::kSize);
  double squared = 0;
  for (std::size_t i = 0; i < v.size(); ++i) {
    v[i] = static_cast<float>(std::cos(phase * (1.0 + double(i))));
    squared += v[i] * v[i];
  }
  for (float& x : v) x /= static_cast<float>(std::sqrt(squared));
  return v;
}

Tensor view(std::vector<float>& values) {
  return {values.data(), DType::f32, Shape{static_cast<std::int64_t>(values.size())}};
}

TEST(DifferenceHessian, MatchesTheExactProduct) {
  CpuBackend backend;
  CoshModel model;
  DifferenceHessian hessian(backend);
  hessian.begin_block(model.weights(), model.gradient());
  for (const double phase : {0.4, 1.1, 2.3}) {
    std::vector<float> v = unit_vector(phase), product(v.size());
    hessian(view(v), view(product));
    const std::vector<double> exact = model.exact_product(v);
    double error = 0, norm = 0;
    for (std::size_t i = 0; i < v.size(); ++i) {
      error += (product[i] - exact[i]) * (product[i] - exact[i]);
      norm += exact[i] * exact[i];
    }
    EXPECT_LT(std::sqrt(error), 5e-3 * std::sqrt(norm)) << "phase " << phase;
  }
}

TEST(DifferenceHessian, TakesTwoGradientsPerProductAndOnePerBlock) {
  CpuBackend backend;
  CoshModel model;
  DifferenceHessian hessian(backend);
  std::vector<float> v = unit_vector(0.4), product(v.size());
  hessian.begin_block(model.weights(), model.gradient());
  hessian(view(v), view(product));
  const int settled = model.gradients();  // base, product, and repetitions until the step fits
  EXPECT_LE(settled, 5);
  for (int i = 0; i < 5; ++i) hessian(view(v), view(product));
  EXPECT_EQ(model.gradients(), settled + 10);
}

TEST(DifferenceHessian, LeavesTheWeightsBitForBit) {
  CpuBackend backend;
  CoshModel model;
  std::vector<std::byte> before(model.weights().bytes()), after(before.size());
  std::memcpy(before.data(), model.weights().data, before.size());
  DifferenceHessian hessian(backend);
  std::vector<float> v = unit_vector(0.9), product(v.size());
  hessian.begin_block(model.weights(), model.gradient());
  hessian(view(v), view(product));
  std::memcpy(after.data(), model.weights().data, after.size());
  EXPECT_EQ(before, after);

  int calls = 0;
  hessian.begin_block(model.weights(), [&]() -> Tensor {
    if (++calls == 2) throw std::runtime_error("gradient failed");
    return model.gradient()();
  });
  EXPECT_THROW(hessian(view(v), view(product)), std::runtime_error);
  std::memcpy(after.data(), model.weights().data, after.size());
  EXPECT_EQ(before, after);
}

TEST(DifferenceHessian, NoCurvatureGivesExactZeros) {
  CpuBackend backend;
  for (const float constant : {0.0f, 2.0f}) {
    std::vector<float> weights(8, 0.0f), gradient(8, constant), v(8, 0.5f), product(8, 1.0f);
    DifferenceHessian hessian(backend);
    hessian.begin_block(view(weights), [&] { return view(gradient); });
    hessian(view(v), view(product));
    EXPECT_EQ(product, std::vector<float>(8, 0.0f));
  }
}

TEST(DifferenceHessian, NaNGradientGivesNaNProduct) {
  CpuBackend backend;
  std::vector<float> weights(4, 1.0f), gradient(4, 1.0f), v(4, 0.5f), product(4);
  DifferenceHessian hessian(backend);
  hessian.begin_block(view(weights), [&] { return view(gradient); });
  gradient[2] = std::nanf("");
  hessian(view(v), view(product));
  EXPECT_TRUE(std::isnan(product[2]));
}

TEST(DifferenceHessian, BlocksOfDifferentSizesShareTheBuffers) {
  CpuBackend backend;
  DifferenceHessian hessian(backend);
  for (const std::size_t n : {4, 32, 8}) {
    std::vector<float> weights(n, 1.0f), gradient(n), v(n, 0.0f), product(n);
    v[n - 1] = 1.0f;
    hessian.begin_block(view(weights), [&] {  // f = sum_i i w_i^2 / 2
      for (std::size_t i = 0; i < n; ++i) gradient[i] = static_cast<float>(i) * weights[i];
      return view(gradient);
    });
    hessian(view(v), view(product));
    EXPECT_NEAR(product[n - 1], static_cast<double>(n - 1), 2e-3 * static_cast<double>(n));
    EXPECT_EQ(product[0], 0.0f);
  }
}

}  // namespace
}  // namespace bitfall
