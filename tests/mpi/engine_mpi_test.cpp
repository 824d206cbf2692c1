// Data parallel training: runs under mpirun with two and with four ranks.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "core/error.h"
#include "csrc_cpu/mpi_communicator.h"
#include "tests/mpi/rank_failure.h"
#include "tests/support/temporary_folder.h"
#include "tests/support/tiny_engine.h"

namespace bitfall {
namespace {

using test::masters;
using test::tiny_batch;
using test::tiny_engine;

constexpr int kGlobalBatch = 8;

MpiCommunicator& world() {
  static MpiCommunicator communicator;
  return communicator;
}

std::string config(int micro_batch) {
  return concat(R"("train_batch_size": 8, "train_micro_batch_size_per_gpu": )", micro_batch,
                R"(, "gradient_clipping": 1.0, "optimizer": {"params": {"eps": 1e-3}},
      "quantize_training": {"enabled": true, "quantize_groups": 2,
        "quantize_bits": {"start_bits": 8, "target_bits": 5},
        "quantize_schedule": {"quantize_period": 1, "schedule_offset": 0},
        "quantize_algo": {"rounding": "stochastic"}, "eigenvalue": {"enabled": true}})");
}

/// This rank's samples of a step, cut from the global batch.
std::vector<Batch> share(int step, int first, int count) {
  return {tiny_batch(kGlobalBatch * step + first, count, first)};
}

std::vector<std::byte> bytes_of(const std::vector<float>& values) {
  std::vector<std::byte> bytes(values.size() * sizeof(float));
  std::memcpy(bytes.data(), values.data(), bytes.size());
  return bytes;
}

void expect_same_on_all_ranks(const std::vector<float>& values) {
  const std::vector<std::byte> mine = bytes_of(values);
  for (const std::vector<std::byte>& other : world().all_gather(mine)) EXPECT_TRUE(other == mine);
}

double largest_difference(const std::vector<float>& a, const std::vector<float>& b) {
  double largest = 0;
  for (std::size_t i = 0; i < a.size(); ++i) {
    largest = std::max(largest, std::fabs(double{a[i]} - double{b[i]}));
  }
  return largest;
}

// Dropout, stochastic rounding and eigenvalues included.
TEST(EngineMpi, RanksEqualOneProcessWithTheSummedBatch) {
  const test::TinyModel model{.dropout = 0.1f};
  const int micro_batch = kGlobalBatch / world().world_size();
  SingleProcess alone;
  const auto single = tiny_engine(config(kGlobalBatch), alone, model);
  // Ranks begin with different weights: those of rank 0 count.
  test::TinyModel own = model;
  own.weight_seed += static_cast<std::uint32_t>(world().rank());
  const auto parallel = tiny_engine(config(micro_batch), world(), own);

  for (int step = 0; step < 4; ++step) {
    const StepResult expected = single->train_batch(share(step, 0, kGlobalBatch));
    const StepResult seen =
        parallel->train_batch(share(step, world().rank() * micro_batch, micro_batch));
    EXPECT_NEAR(seen.loss, expected.loss, 1e-5) << "step " << step;
    EXPECT_NEAR(seen.grad_norm, expected.grad_norm, 1e-4 * (1 + expected.grad_norm));
    EXPECT_EQ(seen.bits, expected.bits);
    ASSERT_EQ(seen.eigenvalues.size(), expected.eigenvalues.size());
    for (std::size_t i = 0; i < seen.eigenvalues.size(); ++i) {
      EXPECT_NEAR(seen.eigenvalues[i].normalized, expected.eigenvalues[i].normalized, 0.02);
    }
    expect_same_on_all_ranks(masters(*parallel));
  }
  EXPECT_LT(largest_difference(masters(*parallel), masters(*single)), 2e-4);
}

// The last step of an epoch: rank 0 has all samples that are left.
TEST(EngineMpi, RanksWithoutSamples) {
  SingleProcess alone;
  const auto single = tiny_engine(R"("train_batch_size": 8)", alone);
  const auto parallel = tiny_engine(R"("train_batch_size": 8)", world());
  const StepResult expected = single->train_batch(share(0, 0, 1));
  const StepResult seen =
      parallel->train_batch(world().rank() == 0 ? share(0, 0, 1) : std::vector<Batch>{});
  EXPECT_NEAR(seen.loss, expected.loss, 1e-6);
  EXPECT_NEAR(seen.grad_norm, expected.grad_norm, 1e-5);
  expect_same_on_all_ranks(masters(*parallel));
}

TEST(EngineMpi, CheckpointsAreWrittenOnceAndFailTogether) {
  const auto engine = tiny_engine(R"("train_batch_size": 8)", world());
  const int micro_batch = kGlobalBatch / world().world_size();
  const int first = world().rank() * micro_batch;
  TemporaryFolder own_folder;
  // All ranks use the folder of rank 0.
  const std::string name = own_folder.path().string();
  std::vector<std::byte> bytes(name.size());
  std::memcpy(bytes.data(), name.data(), name.size());
  world().broadcast(bytes, 0);
  const std::string folder(reinterpret_cast<const char*>(bytes.data()), bytes.size());

  engine->train_batch(share(0, first, micro_batch));
  engine->updater().save_checkpoint(folder, "a", "{}");
  const std::vector<float> saved = masters(*engine);
  engine->train_batch(share(1, first, micro_batch));
  EXPECT_EQ(engine->updater().load_checkpoint(folder, ""), "{}");
  EXPECT_TRUE(test::same_bits(masters(*engine), saved));
  EXPECT_EQ(engine->updater().global_step(), 1);
  // Only one rank is given a tag that does not exist; the others must not wait for it.
  const std::string tag = world().rank() == 0 ? "missing" : "a";
  EXPECT_THROW(engine->updater().load_checkpoint(folder, tag), CheckpointError);
  EXPECT_TRUE(test::same_bits(masters(*engine), saved));
  world().barrier();
}

}  // namespace

int run_program(int argc, char** argv) {
  return test::run_tests_or_fail(argc, argv, world(),
                                 [] { return tiny_engine(R"("train_batch_size": 8)", world()); });
}

}  // namespace bitfall

int main(int argc, char** argv) { return bitfall::run_program(argc, argv); }
