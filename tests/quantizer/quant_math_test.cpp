// The arithmetic of spec A5 on one group at a time: published values, properties, extreme inputs.
#include "quantizer/quant_math.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <random>
#include <set>
#include <vector>

namespace bitfall {
namespace {

constexpr float kLargest = std::numeric_limits<float>::max();
constexpr float kSmallest = std::numeric_limits<float>::denorm_min();
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

QuantRange range_of(const std::vector<float>& group) {
  QuantRange range;
  for (const float value : group) {
    range.min_key = std::min(range.min_key, order_key(value));
    range.max_key = std::max(range.max_key, order_key(value));
  }
  return range;
}

QuantGroup group_of(const std::vector<float>& group, int bits, QuantType q_type) {
  const QuantRange range = range_of(group);
  if (bits > 2) return uniform_group(bits, q_type, range);
  const auto numel = static_cast<std::int64_t>(group.size());
  const MagnitudeSum all = magnitude_sum(group.data(), numel, kNoThreshold);
  const float threshold = bits == 2 ? ternary_threshold(all) : 0.0f;
  return sign_group(range, threshold, magnitude_sum(group.data(), numel, threshold));
}

std::vector<float> quantized(const std::vector<float>& group, int bits,
                             QuantType q_type = QuantType::symmetric) {
  const QuantGroup shared = group_of(group, bits, q_type);
  std::vector<float> values;
  for (const float value : group) {
    const float code = bits > 2 ? uniform_code(value, shared, CodeLimits(bits, q_type), 0.0f)
                                : sign_code(value, shared);
    values.push_back(dequantize(code, shared));
  }
  return values;
}

void expect_near(const std::vector<float>& actual, const std::vector<float>& expected,
                 float tolerance) {
  ASSERT_EQ(actual.size(), expected.size());
  for (std::size_t i = 0; i < actual.size(); ++i)
    EXPECT_NEAR(actual[i], expected[i], tolerance) << "element " << i;
}

// Values that DeepSpeed itself gave (its torch path of 0.7 and later).
TEST(QuantMath, PublishedValues) {
  const std::vector<float> x{1, -1, 0.5f, -0.25f};
  EXPECT_EQ(quantized(x, 8), (std::vector<float>{0.9921875f, -1, 0.5f, -0.25f}));
  EXPECT_EQ(quantized(x, 8, QuantType::asymmetric),
            (std::vector<float>{0.9921875f, -1, 0.5f, -0.25f}));
  expect_near(quantized(x, 2), {0.8333333f, -0.8333333f, 0.8333333f, 0}, 1e-7f);
  EXPECT_EQ(quantized(x, 1), (std::vector<float>{0.6875f, -0.6875f, 0.6875f, -0.6875f}));

  const std::vector<float> w{-0.3f, 0, 0.71f, 0.2f};
  expect_near(quantized(w, 8, QuantType::asymmetric), {-0.2998437f, 0, 0.7062109f, 0.2012109f},
              1e-7f);
  expect_near(quantized(w, 4, QuantType::asymmetric), {-0.315625f, 0, 0.63125f, 0.189375f}, 1e-7f);
  // DeepSpeed computed these in fp16; the same grid in f32.
  expect_near(quantized({0.02f, -0.01f, 0.005f, 0.013f}, 16 - 1),
              {0.0199988f, -0.01f, 0.005f, 0.013f}, 1e-6f);
  expect_near(quantized({0.9f, -0.3f, 0.5f, 0.013f}, 8),
              {0.8929688f, -0.3023438f, 0.4992188f, 0.0140625f}, 1e-7f);
}

TEST(QuantMath, RoundHalfEvenIsNearbyint) {
  for (const float x : {0.0f, -0.0f, 0.5f, 1.5f, 2.5f, -0.5f, -1.5f, -2.5f, 0.49999997f, 4194304.0f,
                        -4194304.0f, 4194303.5f, 2097151.75f})
    EXPECT_EQ(round_half_even(x), std::nearbyint(x)) << x;
  std::mt19937 random(1);
  for (int i = 0; i < 10000; ++i) {
    const float x = static_cast<float>(static_cast<std::int32_t>(random())) * 0x1p-10f;
    EXPECT_EQ(round_half_even(x), std::nearbyint(x)) << x;
  }
}

TEST(QuantMath, OrderKeySortsFloats) {
  const std::vector<float> rising{-kInfinity, -kLargest, -1.0f,    -kSmallest, 0.0f,
                                  kSmallest,  1e-20f,    kLargest, kInfinity};
  for (std::size_t i = 0; i + 1 < rising.size(); ++i) {
    EXPECT_LT(order_key(rising[i]), order_key(rising[i + 1]));
    EXPECT_EQ(from_order_key(order_key(rising[i])), rising[i]);
  }
  EXPECT_TRUE(range_of({-kLargest, kLargest}).finite());
  for (const float bad : {kNaN, -kNaN, kInfinity, -kInfinity})
    EXPECT_FALSE(range_of({1.0f, bad, 2.0f}).finite());
}

std::vector<float> random_group(std::mt19937& random, std::size_t numel) {
  std::normal_distribution<float> normal(0.0f, 1.0f);
  const float scale = std::ldexp(1.0f, static_cast<int>(random() % 60) - 30);
  const float shift = random() % 2 == 0 ? 0.0f : normal(random);
  std::vector<float> group(numel);
  for (float& value : group) value = scale * (normal(random) + shift);
  if (numel > 3) group[random() % numel] = 0.0f;
  return group;
}

TEST(QuantMath, PropertiesOfUniformGrids) {
  std::mt19937 random(20210524);
  for (int trial = 0; trial < 600; ++trial) {
    const int bits = 3 + trial % 13;
    const auto q_type = trial % 2 == 0 ? QuantType::symmetric : QuantType::asymmetric;
    const std::vector<float> group = random_group(random, 2 + random() % 400);
    const QuantGroup shared = group_of(group, bits, q_type);
    const CodeLimits limits(bits, q_type);
    const std::vector<float> values = quantized(group, bits, q_type);
    EXPECT_LE(std::set<float>(values.begin(), values.end()).size(), std::size_t{1} << bits);
    for (std::size_t i = 0; i < group.size(); ++i) {
      const float code = uniform_code(group[i], shared, limits, 0.0f);
      EXPECT_EQ(code, std::nearbyint(code));
      EXPECT_GE(code, limits.min);
      EXPECT_LE(code, limits.max);
      // Zero is exact; as the largest element of an asymmetric group it moves like any largest one.
      EXPECT_TRUE(group[i] != 0.0f || values[i] == 0.0f || code == limits.max);
      // Inside the clamp the error is half a step, but for the roundings of f32 itself; the clamp
      // costs a step more at most, and the zero point's rounding moves it by half a step.
      const bool clamped = code == limits.min || code == limits.max;
      const double allowed =
          (clamped ? 1.5 : 0.5) * shared.scale * 1.0001 + std::ldexp(std::fabs(group[i]), -23);
      EXPECT_LE(std::fabs(double{values[i]} - double{group[i]}), allowed)
          << "bits " << bits << " element " << group[i];
      // A value on the grid stays where it is.
      EXPECT_EQ(dequantize(uniform_code(values[i], shared, limits, 0.0f), shared), values[i]);
    }
  }
}

TEST(QuantMath, SymmetricIsOddButForTheLargestCode) {
  std::mt19937 random(3);
  for (int trial = 0; trial < 100; ++trial) {
    const int bits = 3 + trial % 13;
    std::vector<float> group = random_group(random, 64);
    const QuantGroup shared = group_of(group, bits, QuantType::symmetric);
    const CodeLimits limits(bits, QuantType::symmetric);
    for (float value : group) {
      const float code = uniform_code(value, shared, limits, 0.0f);
      const float mirrored = uniform_code(-value, shared, limits, 0.0f);
      EXPECT_TRUE(code == -mirrored || code == limits.min || mirrored == limits.min) << value;
    }
  }
}

TEST(QuantMath, ConstantGroupsStayWhatTheyAre) {
  for (const float value :
       {0.0f, -0.0f, 1.0f, -1.0f, 0.3f, kLargest, -kLargest, kSmallest, -kSmallest, 1e-40f}) {
    for (int bits = 1; bits < kCastBits; ++bits) {
      for (const std::size_t numel : {1u, 7u}) {
        const std::vector<float> group(numel, value);
        EXPECT_EQ(quantized(group, bits), group) << bits << " bits of " << value;
        if (bits <= 2) continue;
        EXPECT_EQ(quantized(group, bits, QuantType::asymmetric), group)
            << bits << " bits of " << value;
      }
    }
  }
  EXPECT_EQ(quantized({0.0f, -0.0f}, 8), (std::vector<float>{0.0f, 0.0f}));
}

TEST(QuantMath, ExtremeGroupsGiveFiniteValues) {
  const std::vector<std::vector<float>> groups{
      {kLargest, -kLargest, 1.0f, 0.0f},
      {kLargest, kLargest / 2, 3e38f},
      {-kLargest, 1e31f, 0.0f},
      {-kLargest, 0.3f * kLargest},
      {-kLargest, std::nextafter(-kLargest, 0.0f)},
      {kSmallest, -kSmallest, 0.0f},
      {kSmallest, 2 * kSmallest, 3 * kSmallest},
      {100 * kSmallest, -37 * kSmallest},
      {1e-39f, 2e-39f, -1.5e-39f},
      {1.0f, std::nextafter(1.0f, 2.0f)},
      {1.0f, 1.0f + 0x1p-20f, 1.0f + 0x1p-19f},
      {-1.0f, std::nextafter(-1.0f, 0.0f)},
      {kLargest, kSmallest},
      {-0.0f, kSmallest},
  };
  for (const std::vector<float>& group : groups) {
    for (int bits = 1; bits < kCastBits; ++bits) {
      for (const auto q_type : {QuantType::symmetric, QuantType::asymmetric}) {
        if (bits <= 2 && q_type == QuantType::asymmetric) continue;
        for (const float value : quantized(group, bits, q_type)) {
          EXPECT_TRUE(std::isfinite(value)) << bits << " bits, " << group[0];
        }
      }
    }
  }
}

TEST(QuantMath, ZeroPointsStayWithinExactIntegers) {
  // A range far narrower than its distance from zero: value stays within a few units of f32.
  for (const float width : {0x1p-23f, 0x1p-20f, 0x1p-14f, 0x1p-7f}) {
    const std::vector<float> group{1.0f, 1.0f + width / 2, 1.0f + width};
    for (int bits = 3; bits < kCastBits; ++bits) {
      const QuantGroup shared = group_of(group, bits, QuantType::asymmetric);
      EXPECT_LE(std::fabs(shared.zero_point), 0x1p22f);
      const std::vector<float> values = quantized(group, bits, QuantType::asymmetric);
      for (std::size_t i = 0; i < group.size(); ++i)
        EXPECT_NEAR(values[i], group[i], shared.scale * 1.01f);
    }
  }
}

TEST(QuantMath, NonFiniteGroupsBecomeNaN) {
  for (const float bad : {kNaN, -kNaN, kInfinity, -kInfinity}) {
    for (int bits = 1; bits < kCastBits; ++bits) {
      for (const float value : quantized({1.0f, bad, 0.0f, -2.0f}, bits))
        EXPECT_TRUE(std::isnan(value)) << bits << " bits with " << bad;
    }
  }
}

TEST(QuantMath, StochasticOffsetsAreUniformAndInsideTheOpenInterval) {
  EXPECT_EQ(stochastic_offset(0u), -0.5f + 0x1p-17f);
  EXPECT_EQ(stochastic_offset(65535u), 0.5f - 0x1p-17f);
  double sum = 0, squares = 0;
  constexpr int kCount = 100000;
  for (int element = 0; element < kCount; ++element) {
    const double offset = stochastic_offset(StochasticKey{7, 3, 1}, element);
    sum += offset;
    squares += offset * offset;
  }
  EXPECT_NEAR(sum / kCount, 0.0, 5 * std::sqrt(1.0 / 12 / kCount));
  EXPECT_NEAR(squares / kCount, 1.0 / 12, 0.002);
}

TEST(QuantMath, StochasticOffsetsDependOnEveryKey) {
  const StochasticKey key{7, 3, 1};
  const auto differing = [&](const StochasticKey& other) {
    int count = 0;
    for (std::int64_t element = 0; element < 1000; ++element)
      count += stochastic_offset(key, element) != stochastic_offset(other, element);
    return count;
  };
  EXPECT_EQ(differing(key), 0);
  EXPECT_GT(differing({8, 3, 1}), 990);
  EXPECT_GT(differing({7 + (1ull << 32), 3, 1}), 990);
  EXPECT_GT(differing({7, 4, 1}), 990);
  EXPECT_GT(differing({7, 3 + (1ull << 32), 1}), 990);
  EXPECT_GT(differing({7, 3, 2}), 990);
}

TEST(QuantMath, StochasticRoundingKeepsValuesOnTheGrid) {
  for (int bits = 3; bits <= 8; ++bits) {
    const QuantGroup group{.scale = 0.125f};
    const CodeLimits limits(bits, QuantType::symmetric);
    for (float code = limits.min; code <= limits.max; ++code) {
      for (const std::uint32_t random : {0u, 65535u}) {
        EXPECT_EQ(uniform_code(code * group.scale, group, limits, stochastic_offset(random)), code);
      }
    }
  }
}

}  // namespace
}  // namespace bitfall
