#include "core/rng.h"

#include <gtest/gtest.h>

#include <cmath>
#include <set>
#include <vector>

namespace bitfall {
namespace {

void expect_block(PhiloxBlock counter, PhiloxKey key, const PhiloxBlock& expected) {
  const PhiloxBlock block = philox(counter, key);
  for (int word = 0; word < 4; ++word) EXPECT_EQ(block.word[word], expected.word[word]) << word;
}

TEST(Philox, MatchesTheKnownAnswersOfItsAuthors) {
  // Random123, kat_vectors, philox4x32 with 10 rounds.
  expect_block({{0, 0, 0, 0}}, {0, 0}, {{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}});
  expect_block({{0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff}}, {0xffffffff, 0xffffffff},
               {{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}});
  expect_block({{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}}, {0xa4093822, 0x299f31d0},
               {{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}});
}

TEST(Dropout, IsUnbiasedForItsRoundedProbability) {
  for (const float probability : {0.1f, 0.5f, 0.9f}) {
    const Dropout dropout{probability, 1, 2};
    const double kept = 1 - dropout.threshold() / 65536.0;
    EXPECT_NEAR(kept * double{dropout.scale()}, 1.0, 1e-6);
    EXPECT_NEAR(kept, 1 - double{probability}, 1e-5);
    EXPECT_TRUE(dropout.enabled());
  }
  EXPECT_FALSE(Dropout{}.enabled());
}

TEST(Dropout, BitsDependOnEveryKey) {
  const Dropout base{0.1f, 7, 9};
  const auto bits_of = [](const Dropout& dropout, std::uint32_t sample, std::uint32_t position) {
    std::vector<std::uint32_t> bits;
    for (std::uint32_t column = 0; column < 300; ++column)
      bits.push_back(dropout_bits(dropout, sample, position, column));
    return bits;
  };
  Dropout seed = base, high_seed = base, site = base;
  seed.seed = 70;
  high_seed.seed += std::uint64_t{1} << 32;
  site.site = 90;
  const std::set<std::vector<std::uint32_t>> different{
      bits_of(base, 1, 2), bits_of(base, 2, 1),      bits_of(base, 1, 3),
      bits_of(seed, 1, 2), bits_of(high_seed, 1, 2), bits_of(site, 1, 2)};
  EXPECT_EQ(different.size(), 6u);
}

TEST(Dropout, SamplesOfManyStepsHaveKeysOfTheirOwn) {
  std::set<std::uint32_t> keys;
  for (std::uint32_t step = 0; step < 1000; ++step)
    for (std::uint32_t sample = 0; sample < 256; ++sample)
      keys.insert(sample_key_in_step(sample, step));
  EXPECT_EQ(keys.size(), 256000u);
}

TEST(Dropout, BitsAreUniformAndUncorrelatedBetweenNeighbours) {
  const Dropout dropout{0.1f, 42, 1};
  constexpr std::uint32_t kCount = 1 << 16;
  double mean = 0, product = 0, previous = 0;
  for (std::uint32_t column = 0; column < kCount; ++column) {
    const double value = dropout_bits(dropout, 3, 4, column) / 65536.0 - 0.5;
    mean += value / kCount;
    product += value * previous / kCount;
    previous = value;
  }
  // Five standard deviations of means of uniform numbers.
  EXPECT_NEAR(mean, 0, 5 * std::sqrt(1.0 / 12 / kCount));
  EXPECT_NEAR(product, 0, 5 * (1.0 / 12) / std::sqrt(kCount));
}

TEST(Uniform01, StaysBelowOne) {
  EXPECT_EQ(uniform01(0), 0.0f);
  EXPECT_LT(uniform01(0xffffffffu), 1.0f);
}

}  // namespace
}  // namespace bitfall
