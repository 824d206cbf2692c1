#include "core/dtype.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <string>

namespace bitfall {
namespace {

template <typename T>
T from_bits(std::uint32_t bits) {
  return T{static_cast<std::uint16_t>(bits)};
}

/// Every 16-bit pattern survives the way to f32 and back.
template <typename T>
void expect_round_trip() {
  for (std::uint32_t bits = 0; bits < 0x10000; ++bits) {
    const float value = to_float(from_bits<T>(bits));
    if (std::isnan(value)) {
      EXPECT_TRUE(std::isnan(to_float(from_float<T>(value)))) << bits;
    } else {
      EXPECT_EQ(from_float<T>(value).bits, bits);
    }
  }
}

/// Between two finite neighbours: the nearer one, at the middle the one with an even last bit.
template <typename T>
void expect_nearest_even(std::uint32_t largest_finite) {
  for (std::uint32_t bits = 0; bits < largest_finite; ++bits) {
    const double low = to_float(from_bits<T>(bits)), high = to_float(from_bits<T>(bits + 1));
    const auto middle = static_cast<float>((low + high) / 2);
    EXPECT_EQ(from_float<T>(middle).bits, bits + bits % 2);
    EXPECT_EQ(from_float<T>(std::nextafter(middle, 0.0f)).bits, bits);
    EXPECT_EQ(from_float<T>(std::nextafter(middle, INFINITY)).bits, bits + 1);
    EXPECT_EQ(from_float<T>(-middle).bits, 0x8000u + bits + bits % 2);
  }
}

TEST(BFloat16, RoundTrip) { expect_round_trip<BFloat16>(); }
TEST(Float16, RoundTrip) { expect_round_trip<Float16>(); }
TEST(Float16, RoundsToNearestEven) { expect_nearest_even<Float16>(0x7bff); }

TEST(BFloat16, RoundsToNearestEven) { expect_nearest_even<BFloat16>(0x7f7f); }

TEST(Float16, OverflowsToInfinityAsHardwareDoes) {
  EXPECT_EQ(from_float<Float16>(65504.0f).bits, 0x7bff);
  EXPECT_EQ(from_float<Float16>(65519.9f).bits, 0x7bff);
  EXPECT_EQ(from_float<Float16>(65520.0f).bits, 0x7c00);
  EXPECT_EQ(from_float<Float16>(-1e30f).bits, 0xfc00);
}

TEST(DType, VisitRefusesIntegers) {
  const auto size = [](auto tag) { return sizeof(typename decltype(tag)::type); };
  EXPECT_EQ(visit_dtype(DType::f32, size), 4u);
  EXPECT_EQ(visit_dtype(DType::bf16, size), 2u);
  EXPECT_EQ(visit_dtype(DType::f16, size), 2u);
  EXPECT_THROW(visit_dtype(DType::s32, size), UnsupportedError);
  EXPECT_THROW(visit_dtype(DType::s8, size), UnsupportedError);
}

TEST(DType, NamesAndSizes) {
  for (const DType dtype : {DType::f32, DType::bf16, DType::f16, DType::s32, DType::s8})
    EXPECT_EQ(size_in_bytes(dtype) * 8,
              std::stoul(std::string(name(dtype)).substr(name(dtype).find_first_of("0123456789"))));
}

}  // namespace
}  // namespace bitfall
