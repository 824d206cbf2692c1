#include "core/partition.h"

#include <gtest/gtest.h>

namespace bitfall {
namespace {

std::vector<FlatRange> slices(const Partition& partition) {
  std::vector<FlatRange> result;
  for (int rank = 0; rank < partition.world_size(); ++rank) {
    result.push_back(partition.slice(rank));
  }
  return result;
}

TEST(Partition, OneRankOwnsEverything) {
  const Partition partition(48);
  EXPECT_EQ(slices(partition), (std::vector<FlatRange>{{0, 48}}));
  ASSERT_EQ(partition.pieces({3, 20}).size(), 1u);
  EXPECT_EQ(partition.pieces({3, 20})[0].range, (FlatRange{3, 20}));
}

TEST(Partition, CutsAtTheNearestAllowedBorder) {
  // Thirds of 90 are at 30 and 60: inside of the first part 28 is nearer than 35, 60 is in a gap.
  const std::vector<DivisibleRange> parts = {{{0, 49}, 7}, {{64, 26}, 1}};
  EXPECT_EQ(slices(Partition(90, 3, parts)), (std::vector<FlatRange>{{0, 28}, {28, 32}, {60, 30}}));
}

TEST(Partition, WhatIsIndivisibleStaysOnOneRank) {
  const std::vector<DivisibleRange> parts = {{{0, 80}, 80}, {{80, 10}, 10}};
  // 45 of 90 is nearer to 80 than to 0; the quarters at 22 and 67 fall to both ends.
  EXPECT_EQ(slices(Partition(90, 2, parts)), (std::vector<FlatRange>{{0, 80}, {80, 10}}));
  EXPECT_EQ(slices(Partition(90, 4, parts)),
            (std::vector<FlatRange>{{0, 0}, {0, 80}, {80, 0}, {80, 10}}));
}

TEST(Partition, BorderOfAShortLastUnitIsTheEndOfThePart) {
  const std::vector<DivisibleRange> parts = {{{0, 10}, 8}, {{16, 2}, 2}};
  EXPECT_EQ(slices(Partition(18, 2, parts)), (std::vector<FlatRange>{{0, 8}, {8, 10}}));
  EXPECT_EQ(slices(Partition(28, 2, std::vector<DivisibleRange>{{{0, 15}, 8}})),
            (std::vector<FlatRange>{{0, 15}, {15, 13}}));
}

TEST(Partition, PiecesCoverARangeInOrder) {
  const Partition partition(100, 4, {});
  const std::vector<Partition::Piece> pieces = partition.pieces({20, 60});
  ASSERT_EQ(pieces.size(), 4u);
  const std::vector<FlatRange> expected = {{20, 5}, {25, 25}, {50, 25}, {75, 5}};
  for (std::size_t i = 0; i < pieces.size(); ++i) {
    EXPECT_EQ(pieces[i].rank, static_cast<int>(i));
    EXPECT_EQ(pieces[i].range, expected[i]);
  }
  EXPECT_TRUE(partition.pieces({30, 0}).empty());
}

TEST(FlatRange, Intersection) {
  EXPECT_EQ(intersection({10, 10}, {0, 15}), (FlatRange{10, 5}));
  EXPECT_EQ(intersection({10, 10}, {12, 3}), (FlatRange{12, 3}));
  EXPECT_EQ(intersection({10, 10}, {30, 5}).numel, 0);
  EXPECT_EQ(intersection({10, 10}, {0, 5}).numel, 0);
}

}  // namespace
}  // namespace bitfall
