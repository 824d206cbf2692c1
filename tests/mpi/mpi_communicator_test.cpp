// Runs under mpirun with two and with four ranks; every rank runs every test.
#include "csrc_cpu/mpi_communicator.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "core/error.h"

namespace bitfall {
namespace {

/// One for the process: tests share it as a training run does.
MpiCommunicator& world() {
  static MpiCommunicator communicator;
  return communicator;
}

Tensor view(std::vector<float>& values) {
  return {values.data(), DType::f32, Shape{static_cast<std::int64_t>(values.size())}};
}

/// What `rank` contributes: no sum of these is exact in f32.
float contribution(int rank, std::size_t i) {
  return std::sin(0.37f * static_cast<float>(i % 1000) + static_cast<float>(rank));
}

std::vector<float> contributions(int rank, std::size_t size) {
  std::vector<float> values(size);
  for (std::size_t i = 0; i < size; ++i) values[i] = contribution(rank, i);
  return values;
}

std::vector<std::byte> bytes_of(const std::vector<float>& values) {
  std::vector<std::byte> bytes(values.size() * sizeof(float));
  if (!bytes.empty()) std::memcpy(bytes.data(), values.data(), bytes.size());
  return bytes;
}

void expect_same_on_all_ranks(const std::vector<float>& values) {
  for (const std::vector<std::byte>& other : world().all_gather(bytes_of(values)))
    EXPECT_TRUE(other == bytes_of(values));
}

/// Below, at and beyond the size of one message.
class AllReduce : public testing::TestWithParam<std::size_t> {};

TEST_P(AllReduce, SumAndMean) {
  for (const ReduceOp op : {ReduceOp::sum, ReduceOp::mean}) {
    std::vector<float> values = contributions(world().rank(), GetParam());
    world().all_reduce(view(values), op);
    for (std::size_t i = 0; i < values.size(); ++i) {
      double expected = 0;
      for (int rank = 0; rank < world().world_size(); ++rank) expected += contribution(rank, i);
      if (op == ReduceOp::mean) expected /= world().world_size();
      ASSERT_NEAR(values[i], expected, 1e-6) << i;
    }
    expect_same_on_all_ranks(values);
  }
}

TEST_P(AllReduce, Max) {
  std::vector<float> values = contributions(world().rank(), GetParam());
  world().all_reduce(view(values), ReduceOp::max);
  for (std::size_t i = 0; i < values.size(); ++i) {
    float expected = contribution(0, i);
    for (int rank = 1; rank < world().world_size(); ++rank)
      expected = std::max(expected, contribution(rank, i));
    ASSERT_EQ(values[i], expected) << i;
  }
}

TEST_P(AllReduce, AsyncBucketsMatchTheBlockingCall) {
  std::vector<float> blocking = contributions(world().rank(), GetParam());
  std::vector<float> buckets = blocking;
  world().all_reduce(view(blocking), ReduceOp::mean);
  const Tensor all = view(buckets);
  for (std::int64_t end = all.numel(); end > 0;) {  // as the backward pass: last block first
    const std::int64_t begin = std::max<std::int64_t>(0, end - (all.numel() / 3 + 1));
    world().all_reduce_async(all.flat_slice(begin, end - begin), ReduceOp::mean);
    end = begin;
  }
  world().wait_all();
  for (std::size_t i = 0; i < buckets.size(); ++i) ASSERT_NEAR(buckets[i], blocking[i], 1e-6) << i;
  expect_same_on_all_ranks(buckets);
}

// What the root gets is what every rank gets from an all-reduce, up to the order of the sum.
TEST_P(AllReduce, ReduceToEveryRoot) {
  for (int root = 0; root < world().world_size(); ++root) {
    std::vector<float> everywhere = contributions(world().rank(), GetParam());
    std::vector<float> at_root = everywhere;
    world().all_reduce(view(everywhere), ReduceOp::mean);
    world().reduce_async(view(at_root), ReduceOp::mean, root);
    world().wait_all();
    if (world().rank() != root) continue;
    for (std::size_t i = 0; i < at_root.size(); ++i) {
      ASSERT_NEAR(at_root[i], everywhere[i], 1e-6) << i << " at rank " << root;
    }
    if (world().world_size() == 2) {  // one addition has one order
      EXPECT_TRUE(at_root == everywhere);
    }
  }
}

TEST_P(AllReduce, BroadcastOfATensor) {
  for (int root = 0; root < world().world_size(); ++root) {
    std::vector<float> values = contributions(world().rank(), GetParam());
    world().broadcast(view(values), root);
    EXPECT_TRUE(values == contributions(root, GetParam())) << "from rank " << root;
  }
}

INSTANTIATE_TEST_SUITE_P(Sizes, AllReduce, testing::Values(0, 1, 1000, 1 << 19, 1'200'003));

TEST(MpiCommunicator, NanOnOneRankReachesAll) {
  for (const ReduceOp op : {ReduceOp::sum, ReduceOp::mean, ReduceOp::max}) {
    for (int rank = 0; rank < world().world_size(); ++rank) {
      std::vector<float> values{1.0f, world().rank() == rank ? NAN : 2.0f};
      world().all_reduce(view(values), op);
      EXPECT_FALSE(std::isnan(values[0]));
      EXPECT_TRUE(std::isnan(values[1])) << "from rank " << rank;
      values[1] = world().rank() == rank ? NAN : 2.0f;
      world().reduce_async(view(values), op, 0);
      EXPECT_TRUE(world().rank() != 0 || std::isnan(values[1])) << "from rank " << rank;
    }
  }
}

TEST(MpiCommunicator, RefusesOtherDtypes) {
  std::int32_t value = 1;
  const Tensor tensor{&value, DType::s32, Shape{1}};
  EXPECT_THROW(world().all_reduce(tensor, ReduceOp::sum), UnsupportedError);
  EXPECT_THROW(world().reduce_async(tensor, ReduceOp::sum, 0), UnsupportedError);
}

TEST(MpiCommunicator, BroadcastResizesAndCrossesMessages) {
  for (const std::size_t size : {0, 1, 1000, 20'000'000}) {
    std::vector<std::byte> expected(size);
    for (std::size_t i = 0; i < size; ++i) expected[i] = static_cast<std::byte>(i * 31 + i / 256);
    for (const int root : {0, world().world_size() - 1}) {
      std::vector<std::byte> bytes(7, std::byte{99});
      if (world().rank() == root) bytes = expected;
      world().broadcast(bytes, root);
      EXPECT_TRUE(bytes == expected) << size << " bytes from " << root;
    }
  }
}

TEST(MpiCommunicator, BroadcastRefusesAnUnknownRoot) {
  std::vector<std::byte> bytes;
  EXPECT_THROW(world().broadcast(bytes, world().world_size()), CommunicationError);
  EXPECT_THROW(world().broadcast(bytes, -1), CommunicationError);
  EXPECT_THROW(world().broadcast(Tensor(), -1), CommunicationError);
  EXPECT_THROW(world().reduce_async(Tensor(), ReduceOp::sum, world().world_size()),
               CommunicationError);
}

TEST(MpiCommunicator, AllGatherKeepsRankOrderAndSizes) {
  // Rank 0 contributes nothing, rank r contributes r times its number.
  const auto mine = static_cast<std::size_t>(world().rank());
  const std::vector<std::vector<std::byte>> all =
      world().all_gather(std::vector<std::byte>(mine, static_cast<std::byte>(mine)));
  ASSERT_EQ(all.size(), static_cast<std::size_t>(world().world_size()));
  for (std::size_t rank = 0; rank < all.size(); ++rank)
    EXPECT_EQ(all[rank], std::vector<std::byte>(rank, static_cast<std::byte>(rank)));
}

TEST(MpiCommunicator, RanksOfOneMachineAreNumberedLocally) {
  EXPECT_TRUE(started_by_mpi());
  EXPECT_GT(world().world_size(), 1);
  EXPECT_EQ(world().local_rank(), world().rank());
  world().barrier();
}

TEST(MpiCommunicator, AnotherCommunicatorIsIndependent) {
  std::vector<float> values{1.0f};
  {
    MpiCommunicator second;
    second.all_reduce(view(values), ReduceOp::sum);
  }
  world().all_reduce(view(values), ReduceOp::sum);
  EXPECT_EQ(values[0], static_cast<float>(world().world_size() * world().world_size()));
}

}  // namespace
}  // namespace bitfall

int main(int argc, char** argv) {
  testing::InitGoogleTest(&argc, argv);
  // With --abort, the last rank fails while the others wait for it: all must end at once.
  const bool abort = argc > 1 && std::string(argv[1]) == "--abort";
  bitfall::MpiCommunicator& world = bitfall::world();
  if (abort) {
    if (world.rank() == world.world_size() - 1) world.abort("no space left on device");
    world.barrier();
    return 0;
  }
  if (world.rank() != 0) {
    delete testing::UnitTest::GetInstance()->listeners().Release(
        testing::UnitTest::GetInstance()->listeners().default_result_printer());
  }
  // A rank that fails must fail the run even where mpirun would look at another.
  float failed = RUN_ALL_TESTS() != 0 ? 1.0f : 0.0f;
  const float mine = failed;
  world.all_reduce({&failed, bitfall::DType::f32, bitfall::Shape{1}}, bitfall::ReduceOp::max);
  if (mine != 0) std::fprintf(stderr, "rank %d failed\n", world.rank());
  return failed != 0 ? 1 : 0;
}
