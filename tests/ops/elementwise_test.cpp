#include <cmath>
#include <limits>

#include "tests/support/backend_fixture.h"

namespace bitfall::test {
namespace {

constexpr DType kFloating[] = {DType::f32, DType::bf16, DType::f16};

class ElementwiseTest : public BackendTest {};

/// Ties, both ends of the subnormal and normal ranges of every dtype, and ordinary numbers.
std::vector<double> hard_values() {
  std::vector<double> data{0.0,      -0.0,   1.0,     65504.0,  65519.9,  65520.0,
                           -70000.0, 6e-8,   2.98e-8, 2.99e-8,  6.1e-5,   6.0e-5,
                           1e-40,    -1e-45, 3.4e38,  INFINITY, -INFINITY};
  for (int i = 0; i < 300; ++i) data.push_back(1 + i * 0x1p-12);  // ties of f16 and bf16
  for (int i = 0; i < 300; ++i) data.push_back(-std::ldexp(1.0 + i / 301.0, i - 150));
  return data;
}

TEST_P(ElementwiseTest, CastRoundsToNearestEvenBetweenAllDtypes) {
  const std::vector<double> data = hard_values();
  const Tensor source = floats(Shape{static_cast<std::int64_t>(data.size())}, dtype(), data);
  for (const DType to : kFloating) {
    const Tensor destination = zeros(source.shape, to);
    backend().cast(source, destination);
    EXPECT_TRUE(identical(destination, floats(source.shape, to, values(source)))) << name(to);
  }
}

TEST_P(ElementwiseTest, CastKeepsNan) {
  for (const DType to : kFloating) {
    const Tensor source = floats(Shape{17}, dtype(), std::vector<double>(17, NAN));
    const Tensor destination = zeros(source.shape, to);
    backend().cast(source, destination);
    for (const double value : values(destination)) EXPECT_TRUE(std::isnan(value)) << name(to);
  }
  // A NaN whose upper bits alone look like infinity.
  const Tensor source = zeros(Shape{17}, DType::f32), destination = zeros(Shape{17}, dtype());
  for (int i = 0; i < 17; ++i) source.as<std::uint32_t>()[i] = 0x7f800001u;
  backend().cast(source, destination);
  for (const double value : values(destination)) EXPECT_TRUE(std::isnan(value));
}

TEST_P(ElementwiseTest, CastRefusesWhatDoesNotFit) {
  const Tensor x = zeros(Shape{4}, dtype());
  EXPECT_THROW(backend().cast(x, zeros(Shape{5}, DType::f32)), ShapeError);
  EXPECT_THROW(backend().cast(x, zeros(Shape{4}, DType::s32)), UnsupportedError);
  EXPECT_THROW(backend().cast(zeros(Shape{4}, DType::s8), x), UnsupportedError);
  backend().cast(zeros(Shape{0}, dtype()), zeros(Shape{0}, DType::f32));
}

TEST_P(ElementwiseTest, DropoutFollowsTheGenerator) {
  for (const Shape& shape :
       {Shape{1, 1}, Shape{3, 7}, Shape{3, 384}, Shape{130, 33}, Shape{2, 300}}) {
    const Dropout dropout{0.3f, 0x123456789abcdefull, 5};
    const Tensor x = random(shape, dtype()), y = zeros(shape, dtype()), keys = row_keys(shape[0]);
    backend().dropout(dropout, keys, x, y);
    std::vector<double> expected = values(x);
    for (std::size_t i = 0; i < expected.size(); ++i) {
      const auto columns = static_cast<std::size_t>(shape[1]);
      const auto* key = keys.as<std::uint32_t>() + 2 * (i / columns);
      const std::uint32_t bits =
          dropout_bits(dropout, key[0], key[1], static_cast<std::uint32_t>(i % columns));
      const float multiplier = bits < dropout.threshold() ? 0.0f : dropout.scale();
      expected[i] = static_cast<float>(expected[i]) * multiplier;
    }
    EXPECT_TRUE(identical(y, floats(shape, dtype(), expected))) << shape.to_string();
    backend().dropout(dropout, keys, x, x);
    EXPECT_TRUE(identical(x, y));
  }
}

TEST_P(ElementwiseTest, DropoutDropsTheWantedShare) {
  const Shape shape{200, 512};
  const Tensor x = floats(shape, dtype(), std::vector<double>(200 * 512, 1.0));
  backend().dropout({0.1f, 1, 3}, row_keys(200), x, x);
  double dropped = 0;
  for (const double value : values(x)) dropped += value == 0 ? 1 : 0;
  // Five standard deviations of a binomial.
  EXPECT_NEAR(dropped / (200 * 512), 0.1, 5 * std::sqrt(0.09 / (200 * 512)));
}

TEST_P(ElementwiseTest, DropoutSwitchedOffCopiesWithoutKeys) {
  const Tensor x = random(Shape{3, 9}, dtype()), y = zeros(Shape{3, 9}, dtype());
  backend().dropout({}, {}, x, y);
  EXPECT_TRUE(identical(x, y));
  EXPECT_THROW(backend().dropout({0.5f}, {}, x, y), ShapeError);
  EXPECT_THROW(backend().dropout({0.5f}, row_keys(4), x, y), ShapeError);
  EXPECT_THROW(backend().dropout({}, {}, x, zeros(Shape{9, 3}, dtype())), ShapeError);
}

BITFALL_BACKEND_SUITE(ElementwiseTest);

}  // namespace
}  // namespace bitfall::test
