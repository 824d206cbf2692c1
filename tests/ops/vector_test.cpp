// squared_sum, dot and axpby over flat f32 buffers.
#include <gmock/gmock.h>
#include <omp.h>

#include <cmath>
#include <limits>

#include "core/error.h"
#include "tests/support/backend_fixture.h"

namespace bitfall::test {
namespace {

class Vector : public BackendTest {};

TEST_P(Vector, SumsAreAccumulatedInDoublePrecision) {
  for (const std::int64_t numel : {0, 1, 31, 33, 16384, 16385, 100003}) {
    const Tensor x = random(Shape{numel}, DType::f32), y = random(Shape{numel}, DType::f32);
    const std::vector<double> a = values(x), b = values(y);
    double squares = 0, product = 0;
    for (std::size_t i = 0; i < a.size(); ++i) {
      squares += a[i] * a[i];
      product += a[i] * b[i];
    }
    EXPECT_NEAR(backend().squared_sum(x), squares, 1e-12 * squares) << numel;
    EXPECT_NEAR(backend().dot(x, y), product, 1e-12 * squares) << numel;
  }
}

TEST_P(Vector, SumsHaveTheSameBitsEverywhere) {
  if (GetParam().device != Device::cpu) GTEST_SKIP() << "a GPU adds in an order of its own";
  const auto run = [](CpuIsa isa, int threads) {
    BackendWorkbench bench(isa);
    const Tensor x = bench.random(Shape{100003}, DType::f32);
    const Tensor y = bench.random(x.shape, DType::f32);
    const int before = omp_get_max_threads();
    omp_set_num_threads(threads);
    const double result = bench.backend().dot(x, y);
    omp_set_num_threads(before);
    return result;
  };
  for (const int threads : {1, 2, 3})
    EXPECT_EQ(run(GetParam().isa, threads), run(CpuIsa::generic, 1)) << threads << " threads";
}

TEST_P(Vector, LargeSquaresDoNotOverflow) {
  const Tensor x = floats(Shape{2}, DType::f32, {3e38, 1e-30});
  const double large = x.as<float>()[0];
  EXPECT_DOUBLE_EQ(backend().squared_sum(x), large * large);
}

TEST_P(Vector, FaultsAreVisible) {
  const Tensor x = random(Shape{50000}, DType::f32);
  x.as<float>()[49999] = std::numeric_limits<float>::infinity();
  EXPECT_TRUE(std::isinf(backend().squared_sum(x)));
  x.as<float>()[20000] = std::nanf("");
  EXPECT_TRUE(std::isnan(backend().squared_sum(x)));
}

TEST_P(Vector, AnAllocationThatFailsLeavesTheGpuUsable) {
  if (GetParam().device == Device::cpu) GTEST_SKIP() << "the system may promise what it has not";
  const auto gpu = cuda_library().plugin->make_backend(0, {});
  EXPECT_THAT([&] { static_cast<void>(gpu->allocate(std::size_t{1} << 50)); },
              testing::ThrowsMessage<BackendError>(testing::HasSubstr("bytes are free")));
  const Buffer one = gpu->allocate(sizeof(float));
  EXPECT_EQ(gpu->squared_sum(one.view(DType::f32, Shape{1})), 0.0);
}

TEST_P(Vector, AxpbyCombines) {
  const Tensor x = random(Shape{20003}, DType::f32), y = random(Shape{20003}, DType::f32);
  const Tensor y_before = zeros(y.shape, DType::f32);
  backend().copy(y, y_before);
  backend().axpby(2.0f, x, -0.5f, y);
  for (std::int64_t i = 0; i < y.numel(); ++i)
    ASSERT_EQ(y.as<float>()[i], 2.0f * x.as<float>()[i] - 0.5f * y_before.as<float>()[i]);
}

TEST_P(Vector, AxpbyWithBetaZeroDoesNotReadTheDestination) {
  const Tensor x = random(Shape{100}, DType::f32), y = zeros(Shape{100}, DType::f32);
  y.as<float>()[7] = std::nanf("");
  backend().axpby(3.0f, x, 0.0f, y);
  for (std::int64_t i = 0; i < 100; ++i) ASSERT_EQ(y.as<float>()[i], 3.0f * x.as<float>()[i]);
}

TEST_P(Vector, RefusesWhatDoesNotFit) {
  const Tensor x = zeros(Shape{8}, DType::f32);
  EXPECT_THROW(backend().dot(x, zeros(Shape{7}, DType::f32)), ShapeError);
  EXPECT_THROW(backend().axpby(1, x, 0, zeros(Shape{9}, DType::f32)), ShapeError);
  EXPECT_THROW(backend().squared_sum(zeros(Shape{8}, DType::bf16)), UnsupportedError);
}

INSTANTIATE_TEST_SUITE_P(All, Vector, testing::ValuesIn(backend_cases({DType::f32})), case_name);

}  // namespace
}  // namespace bitfall::test
