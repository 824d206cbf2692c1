// ZeRO stages 1 and 2 against stage 0: runs under mpirun with two and with four ranks.
//
// Stage 1 reduces the same ranges as stage 0 and updates elementwise, so it gives the same bits.
// Stage 2 reduces to one rank, which may add in another order from three ranks on, and sums
// micro-batches after the reduction: equal bits for two ranks without accumulation and clipping
// (whose norm is a sum over ranks), otherwise up to rounding.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <fstream>
#include <iterator>
#include <limits>
#include <string>
#include <vector>

#include "core/error.h"
#include "csrc_cpu/mpi_communicator.h"
#include "tests/mpi/rank_failure.h"
#include "tests/support/temporary_folder.h"
#include "tests/support/tiny_engine.h"

namespace bitfall {
namespace {

using test::tiny_batch;

constexpr int kGlobalBatch = 8;
constexpr double kRoundingBound = 2e-4;  // of weights after some steps of 1e-3; with MoQ codes flip

const std::string kPlain = R"("optimizer": {"params": {"eps": 1e-3, "weight_decay": 0.01}})";

std::string moq(int groups, const std::string& q_type, const std::string& rounding) {
  return kPlain + R"(, "quantize_training": {"enabled": true, "quantize_groups": )" +
         std::to_string(groups) + R"(,
        "quantize_bits": {"start_bits": 8, "target_bits": 4},
        "quantize_schedule": {"quantize_period": 1, "schedule_offset": 1},
        "quantize_algo": {"q_type": ")" +
         q_type + R"(", "rounding": ")" + rounding + R"("}, "eigenvalue": {"enabled": true}})";
}

/// What a training may be; borders of slices differ with the groups.
std::vector<std::string> settings() {
  return {kPlain, R"("bf16": {"enabled": true}, )" + kPlain, moq(1, "symmetric", "nearest"),
          R"("bf16": {"enabled": true}, )" + moq(4, "asymmetric", "stochastic"),
          R"("fp16": {"enabled": true, "initial_scale_power": 8}, )" +
              moq(2, "symmetric", "stochastic")};
}

MpiCommunicator& world() {
  static MpiCommunicator communicator;
  return communicator;
}

int micro_batch() { return kGlobalBatch / world().world_size(); }

std::unique_ptr<Engine> engine_at(int stage, const std::string& setting, int accumulation = 1,
                                  std::uint32_t weight_seed = 1) {
  return test::tiny_engine(concat(R"("train_batch_size": )", kGlobalBatch * accumulation,
                                  R"(, "gradient_accumulation_steps": )", accumulation,
                                  R"(, "zero_optimization": {"stage": )", stage, "}, ", setting),
                           world(), {.dropout = 0.1f, .weight_seed = weight_seed});
}

/// This rank's samples of a step.
std::vector<Batch> share(int step, int accumulation = 1) {
  std::vector<Batch> batches;
  for (int i = 0; i < accumulation; ++i) {
    const int key = kGlobalBatch * i + world().rank() * micro_batch();
    batches.push_back(tiny_batch(kGlobalBatch * accumulation * step + key, micro_batch(), key));
  }
  return batches;
}

std::vector<float> masters(Engine& engine) {
  const Tensor whole = engine.updater().master_weights();
  return {whole.as<float>(), whole.as<float>() + whole.numel()};
}

double largest_difference(const std::vector<float>& a, const std::vector<float>& b) {
  double largest = a.size() == b.size() ? 0 : std::numeric_limits<double>::infinity();
  for (std::size_t i = 0; i < a.size(); ++i) {
    largest = std::max(largest, std::fabs(double{a[i]} - double{b[i]}));
  }
  return largest;
}

/// `exact`: bit for bit.
void expect_same_weights(Engine& seen, Engine& expected, bool exact) {
  const std::vector<float> a = masters(seen), b = masters(expected);
  if (exact) {
    EXPECT_TRUE(test::same_bits(a, b)) << "largest difference " << largest_difference(a, b);
    const Batch batch = tiny_batch(1000, 3);
    EXPECT_EQ(seen.evaluate(batch).logits, expected.evaluate(batch).logits);
  } else {
    EXPECT_LT(largest_difference(a, b), kRoundingBound);
  }
}

std::string shared_folder(const TemporaryFolder& own) {
  const std::string name = own.path().string();
  std::vector<std::byte> bytes(name.size());
  std::memcpy(bytes.data(), name.data(), name.size());
  world().broadcast(bytes, 0);
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

std::string file_bytes(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

TEST(Zero, StagesGiveTheSameTraining) {
  for (const std::string& setting : settings()) {
    SCOPED_TRACE(setting);
    for (const int stage : {1, 2}) {
      SCOPED_TRACE(stage);
      const bool exact = stage == 1 || world().world_size() == 2;
      const auto whole = engine_at(0, setting);
      const auto sliced = engine_at(stage, setting);
      for (int step = 0; step < 4; ++step) {
        const StepResult expected = whole->train_batch(share(step));
        const StepResult seen = sliced->train_batch(share(step));
        EXPECT_EQ(seen.skipped, expected.skipped);
        EXPECT_EQ(seen.bits, expected.bits);
        EXPECT_EQ(seen.eigenvalues.size(), expected.eigenvalues.size());
        EXPECT_NEAR(seen.grad_norm, expected.grad_norm,
                    (exact ? 1e-13 : 1e-3) * (1 + expected.grad_norm));
        EXPECT_NEAR(seen.loss, expected.loss, exact ? 0 : 1e-3) << "step " << step;
      }
      expect_same_weights(*sliced, *whole, exact);
      for (const auto& [name, error] : whole->updater().quantization_error()) {
        const double seen = sliced->updater().quantization_error().at(name);
        EXPECT_NEAR(seen, error, (exact ? 1e-12 : 0.02) * (1 + error)) << name;
      }
    }
  }
}

// Ranks have different numbers of micro-batches, the last rank none; with clipping.
TEST(Zero, AccumulationAndUnevenRanks) {
  const std::string setting = R"("gradient_clipping": 0.5, )" + kPlain;
  for (const int stage : {1, 2}) {
    const auto whole = engine_at(0, setting, 2);
    const auto sliced = engine_at(stage, setting, 2);
    for (int step = 0; step < 4; ++step) {
      std::vector<Batch> batches = share(step, 2);
      if (step == 3) batches.resize(world().rank() + 1 == world().world_size() ? 0 : 1);
      if (step == 2 && world().rank() > 0) batches.resize(1);
      const StepResult expected = whole->train_batch(batches);
      const StepResult seen = sliced->train_batch(batches);
      EXPECT_NEAR(seen.loss, expected.loss, 1e-5);
      EXPECT_NEAR(seen.grad_norm, expected.grad_norm, 1e-4 * (1 + expected.grad_norm));
    }
    expect_same_weights(*sliced, *whole, stage == 1);
  }
}

std::string working_bytes(Engine& engine) {
  const Tensor working = engine.updater().store().working();
  return {working.as<char>(), working.bytes()};
}

// Only rank 0 has a sample, so only there the scaled gradients overflow; all layers would drop.
TEST(Zero, OverflowOnOneRankIsSeenByAll) {
  for (const int stage : {1, 2}) {
    const auto engine = engine_at(
        stage, R"("fp16": {"enabled": true, "initial_scale_power": 30, "hysteresis": 1}, )" +
                   kPlain + R"(, "quantize_training": {"enabled": true,
            "quantize_bits": {"start_bits": 8, "target_bits": 4},
            "quantize_schedule": {"quantize_period": 1, "schedule_offset": 0},
            "quantize_algo": {"rounding": "stochastic"}})");
    const std::vector<float> before = masters(*engine);
    const std::string working_before = working_bytes(*engine);
    StepResult result = engine->train_batch(
        world().rank() == 0 ? std::vector<Batch>{tiny_batch(0, 1)} : std::vector<Batch>{});
    EXPECT_TRUE(result.skipped);
    EXPECT_TRUE(test::same_bits(masters(*engine), before));
    EXPECT_TRUE(working_bytes(*engine) == working_before);
    for (int step = 0; step < 40 && result.skipped; ++step)
      result = engine->train_batch(share(step));
    EXPECT_FALSE(result.skipped);
    EXPECT_FALSE(test::same_bits(masters(*engine), before));
    std::vector<double> scale = sum_over_ranks(world(), {result.loss_scale});
    EXPECT_EQ(scale[0], world().world_size() * result.loss_scale);
  }
}

TEST(Zero, BrokenGradientIsNamedOnAllRanks) {
  for (const int stage : {1, 2}) {
    const auto engine = engine_at(stage, kPlain);
    const ParameterStore& store = engine->updater().store();
    if (world().rank() == 0) {
      store.working(store.index_of("classifier.bias")).as<float>()[0] = NAN;
    }
    try {
      engine->train_batch(share(0));
      FAIL() << "no error";
    } catch (const TrainingError& error) {
      EXPECT_NE(std::string(error.what()).find("the gradient of 'bert.embeddings.word"),
                std::string::npos)
          << error.what();
    }
  }
}

TEST(Zero, CheckpointsDoNotTellTheStage) {
  const std::string setting = R"("bf16": {"enabled": true}, )" + moq(4, "symmetric", "stochastic");
  const TemporaryFolder own;
  const std::string folder = shared_folder(own);
  const bool exact_stage_2 = world().world_size() == 2;
  for (const int stage : {0, 1, 2}) {
    const auto engine = engine_at(stage, setting);
    for (int step = 0; step < 3; ++step) engine->train_batch(share(step));
    engine->updater().save_checkpoint(folder, concat("stage", stage), "{}");
  }
  for (const char* name : {"/model.safetensors", "/optimizer.safetensors"}) {
    const std::string expected = file_bytes(folder + "/stage0" + name);
    EXPECT_GT(expected.size(), 1000u);
    EXPECT_TRUE(file_bytes(folder + "/stage1" + name) == expected) << name;
    EXPECT_TRUE(!exact_stage_2 || file_bytes(folder + "/stage2" + name) == expected) << name;
  }

  for (const int from : {0, 1, 2}) {
    const auto expected = engine_at(from, setting);
    for (int step = 0; step < 5; ++step) expected->train_batch(share(step));
    for (const int to : {0, 1, 2}) {
      SCOPED_TRACE(concat("from stage ", from, " to ", to));
      const auto resumed = engine_at(to, setting, 1, 7);
      resumed->updater().load_checkpoint(folder, concat("stage", from));
      for (int step = 3; step < 5; ++step) resumed->train_batch(share(step));
      expect_same_weights(*resumed, *expected, from == to || exact_stage_2 || from + to == 1);
    }
  }

  // One process goes on from what ranks have written.
  SingleProcess alone;
  const auto single = test::tiny_engine(R"("train_batch_size": 8, )" + setting, alone);
  single->updater().load_checkpoint(folder, "stage1");
  const auto ranks = engine_at(1, setting);
  ranks->updater().load_checkpoint(folder, "stage1");
  EXPECT_TRUE(test::same_bits(masters(*single), masters(*ranks)));
  world().barrier();
}

TEST(Zero, CheckpointThatCannotBeWrittenFailsOnAllRanks) {
  const TemporaryFolder own;
  const std::string folder = shared_folder(own);
  const auto engine = engine_at(2, kPlain);
  std::ofstream(folder + "/file") << "in the way";
  EXPECT_THROW(engine->updater().save_checkpoint(folder + "/file", "a", "{}"), CheckpointError);
  EXPECT_THROW(engine->updater().save_checkpoint(folder, "../a", "{}"), CheckpointError);
  engine->updater().save_checkpoint(folder, "a", "{}");
  world().barrier();
}

TEST(Zero, MemoryIsDivided) {
  const std::string setting = R"("bf16": {"enabled": true}, )" + moq(4, "symmetric", "nearest");
  const auto whole = engine_at(0, setting);
  const auto all = whole->updater().memory_bytes();
  const std::int64_t numel = whole->updater().store().numel();
  for (const int stage : {1, 2}) {
    const auto engine = engine_at(stage, setting);
    const auto mine = engine->updater().memory_bytes();
    const double ranks = world().world_size();
    for (const char* what : {"master", "optimizer"}) {
      const auto total = sum_over_ranks(world(), {static_cast<double>(mine.at(what))});
      EXPECT_EQ(total[0], static_cast<double>(all.at(what)));
      // Borders lie between groups, the largest of which has 160 of 6000 elements.
      EXPECT_NEAR(static_cast<double>(mine.at(what)), static_cast<double>(all.at(what)) / ranks,
                  0.05 * static_cast<double>(all.at(what)));
    }
    EXPECT_EQ(mine.at("working"), 2 * numel);
    if (stage == 1) {
      EXPECT_EQ(mine.at("gradient"), all.at("gradient"));
    } else {
      // The slice, two buckets of a block (more than the embeddings), and the head.
      const ParameterStore& store = engine->updater().store();
      const std::int64_t head = store.numel() - store.block_range(1).end();
      EXPECT_EQ(mine.at("gradient"),
                4 * (store.owned().numel + 2 * store.block_range(0).numel + head));
    }
  }
}

}  // namespace

int run_program(int argc, char** argv) {
  return test::run_tests_or_fail(argc, argv, world(), [] { return engine_at(2, kPlain); });
}

}  // namespace bitfall

int main(int argc, char** argv) { return bitfall::run_program(argc, argv); }
