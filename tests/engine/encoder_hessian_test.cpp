// Hessian products of the encoder against differences of its gradients, and against what every
// Hessian is: linear and symmetric.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <random>

#include "tests/engine/golden_case.h"

namespace bitfall {
namespace {

using ::testing::HasSubstr;

constexpr ForwardContext kDifferentiate{Mode::differentiate, 0, 0};

class HessianCase : public GoldenCase {
 public:
  using GoldenCase::GoldenCase;

  FlatRange range(int block) const { return store.block_range(block); }

  /// Random in the parameters of `block`, zero between them.
  std::vector<float> random_direction(int block, unsigned seed) const {
    std::mt19937 generator(seed);
    std::normal_distribution<float> normal;
    std::vector<float> values(static_cast<std::size_t>(range(block).numel));
    for (const Parameter& parameter : store.parameters()) {
      if (parameter.block != block) continue;
      const auto begin = static_cast<std::size_t>(parameter.offset - range(block).begin);
      for (std::size_t i = 0; i < static_cast<std::size_t>(parameter.numel); ++i) {
        values[begin + i] = normal(generator);
      }
    }
    return values;
  }

  /// H direction, after prepare_hessian.
  std::vector<float> product(int block, std::vector<float> direction) {
    std::vector<float> result(direction.size());
    const Shape shape{static_cast<std::int64_t>(direction.size())};
    Buffer cast_buffer = backend.allocate(direction.size() * sizeof(float));
    const Tensor cast = cast_buffer.view(store.compute_dtype(), shape);
    backend.cast({direction.data(), DType::f32, shape, Device::cpu}, cast);
    model.hessian_product(
        block, store.block_views(block, cast),
        store.block_views(block, {result.data(), DType::f32, shape, Device::cpu}));
    return result;
  }

  /// (g(w + step v) - g(w - step v)) / (2 step), f32.
  std::vector<float> difference(int block, const std::vector<float>& direction, float step) {
    const std::vector<float> plus = gradient_at(block, direction, step);
    std::vector<float> result = gradient_at(block, direction, -step);
    for (std::size_t i = 0; i < result.size(); ++i) {
      result[i] = (plus[i] - result[i]) / (2 * step);
    }
    gradient_at(block, direction, 0);
    return result;
  }

 private:
  std::vector<float> gradient_at(int block, const std::vector<float>& direction, float step) {
    const auto begin = static_cast<std::size_t>(range(block).begin);
    publish();
    float* const weights = store.working().as<float>() + begin;
    for (std::size_t i = 0; i < direction.size(); ++i) weights[i] += step * direction[i];
    const std::vector<float> all = gradients(kDifferentiate);
    return {all.begin() + static_cast<std::ptrdiff_t>(begin),
            all.begin() + static_cast<std::ptrdiff_t>(begin + direction.size())};
  }
};

double dot(const std::vector<float>& a, const std::vector<float>& b) {
  double sum = 0;
  for (std::size_t i = 0; i < a.size(); ++i) sum += double{a[i]} * double{b[i]};
  return sum;
}

class EncoderHessian : public ::testing::TestWithParam<const char*> {};

INSTANTIATE_TEST_SUITE_P(Tiny, EncoderHessian,
                         ::testing::Values("tiny_classification_gelu", "tiny_classification_relu",
                                           "tiny_regression_gelu_new", "tiny_span_tanh"));

TEST_P(EncoderHessian, ProductsMatchDifferencesOfGradients) {
  HessianCase golden(GetParam(), DType::f32);
  for (int block = 0; block < golden.store.num_blocks(); ++block) {
    const std::vector<float> direction = golden.random_direction(block, 1);
    const std::vector<float> expected = golden.difference(block, direction, 2e-4f);
    golden.model.prepare_hessian(golden.batch, 1.0f);
    EXPECT_LT(relative_error(golden.product(block, direction), expected), 5e-3) << block;
  }
}

TEST_P(EncoderHessian, ProductsAreSymmetricLinearAndScaled) {
  HessianCase golden(GetParam(), DType::f32);
  golden.model.prepare_hessian(golden.batch, 1.0f);
  for (int block = golden.store.num_blocks() - 1; block >= 0; --block) {
    std::vector<float> u = golden.random_direction(block, 2);
    const std::vector<float> v = golden.random_direction(block, 3);
    const std::vector<float> hu = golden.product(block, u), hv = golden.product(block, v);
    EXPECT_NEAR(dot(v, hu), dot(u, hv), 1e-4 * norm(u) * norm(hv)) << block;
    for (std::size_t i = 0; i < u.size(); ++i) u[i] = 2 * u[i] - v[i];
    std::vector<float> combined = hu;
    for (std::size_t i = 0; i < combined.size(); ++i) combined[i] = 2 * hu[i] - hv[i];
    EXPECT_LT(relative_error(golden.product(block, u), combined), 1e-4) << block;
    EXPECT_EQ(golden.product(block, v), hv) << "products leave something behind";
  }
  const std::vector<float> v = golden.random_direction(0, 3);
  std::vector<float> scaled = golden.product(0, v);
  for (float& value : scaled) value *= -3;
  golden.model.prepare_hessian(golden.batch, -3.0f);
  EXPECT_LT(relative_error(golden.product(0, v), scaled), 1e-5);
}

TEST_P(EncoderHessian, HalfTypesFollowF32) {
  HessianCase reference(GetParam(), DType::f32);
  reference.model.prepare_hessian(reference.batch, 1.0f);
  for (const DType dtype : {DType::bf16, DType::f16}) {
    HessianCase half(GetParam(), dtype);
    half.model.prepare_hessian(half.batch, 1.0f);
    for (int block = 0; block < half.store.num_blocks(); ++block) {
      const std::vector<float> v = half.random_direction(block, 4);
      EXPECT_LT(relative_error(half.product(block, v), reference.product(block, v)),
                dtype == DType::bf16 ? 0.15 : 0.02)
          << name(dtype) << " block " << block;
    }
  }
}

TEST(EncoderHessianErrors, CallsThatDoNotFitAreRefused) {
  HessianCase golden("tiny_classification_gelu", DType::f32);
  const std::vector<float> v = golden.random_direction(1, 1);
  const auto product = [&](int block) { return shape_error([&] { golden.product(block, v); }); };
  EXPECT_THAT(product(1), HasSubstr("prepare_hessian"));
  golden.model.prepare_hessian(golden.batch, 1.0f);
  EXPECT_EQ(product(1), "");
  EXPECT_THAT(shape_error([&] { golden.model.hessian_product(2, {}, {}); }), HasSubstr("block 2"));
  EXPECT_THAT(shape_error([&] { golden.model.hessian_product(1, {}, {}); }),
              HasSubstr("direction has 0 tensors, expected the 16 parameters"));
  golden.gradients(kDifferentiate);
  EXPECT_THAT(product(1), HasSubstr("prepare_hessian"));
  golden.batch.class_labels.clear();
  EXPECT_THAT(shape_error([&] { golden.model.prepare_hessian(golden.batch, 1.0f); }),
              HasSubstr("no labels"));
  EXPECT_THAT(product(1), HasSubstr("prepare_hessian"));
}

}  // namespace
}  // namespace bitfall
