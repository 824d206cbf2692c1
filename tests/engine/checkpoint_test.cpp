#include "engine/checkpoint.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cstdlib>
#include <fstream>
#include <thread>

#include "core/error.h"
#include "tests/support/temporary_folder.h"
#include "tests/support/tiny_engine.h"

namespace bitfall {
namespace {

namespace fs = std::filesystem;
using test::masters;
using test::same_bits;
using test::tiny_batch;
using test::tiny_engine;
using ::testing::AllOf;
using ::testing::HasSubstr;

constexpr const char* kFolderVariable = "BITFALL_CHECKPOINT_TEST_FOLDER";
const test::TinyModel kModel{.dropout = 0.2f};

std::string config_with_lr(const std::string& lr) {
  return R"("train_batch_size": 4, "gradient_accumulation_steps": 2, "gradient_clipping": 1.0,
      "optimizer": {"params": {"weight_decay": 0.01, "lr": )" +
         lr + R"(}},
      "quantize_training": {"enabled": true,
        "quantize_bits": {"start_bits": 10, "target_bits": 4},
        "quantize_schedule": {"quantize_period": 1, "schedule_offset": 0},
        "quantize_algo": {"q_type": "asymmetric", "rounding": "stochastic"},
        "fp16_mixed_quantize": {"enabled": true, "quantize_change_ratio": 0.1},
        "quantize_groups": 2, "eigenvalue": {"enabled": true}})";
}

std::vector<Batch> micro_batches(int step) {
  return {tiny_batch(4 * step, 2, 0), tiny_batch(4 * step + 2, 2, 2)};
}

class CheckpointTest : public ::testing::Test {
 protected:
  SingleProcess communicator;
  test::TinyModel model = kModel;
  TemporaryFolder folder;

  std::unique_ptr<Engine> make(const std::string& config) {
    return tiny_engine(config, communicator, model);
  }

  /// Loads into `engine`, which must fail and leave it as it was.
  std::string load_error(Engine& engine, const std::string& tag = "") {
    const std::vector<float> before = masters(engine);
    try {
      engine.updater().load_checkpoint(folder.path(), tag);
    } catch (const CheckpointError& error) {
      EXPECT_TRUE(same_bits(masters(engine), before));
      EXPECT_EQ(engine.updater().global_step(), 0);
      return error.what();
    }
    return "no error";
  }
};

// Everything at once: dropout, accumulation, scaler with skipped steps, stochastic rounding, mix,
// eigenvalues. The resumed engine starts from other weights, so all it has comes from the file.
TEST_F(CheckpointTest, ResumeEqualsTheUninterruptedRunBitForBit) {
  for (const std::string& precision :
       {std::string(), std::string(R"("bf16": {"enabled": true}, )"),
        std::string(R"("fp16": {"enabled": true, "initial_scale_power": 26, "hysteresis": 2,
                                "loss_scale_window": 2}, )")}) {
    const std::string config = precision + config_with_lr("1e-2");
    const auto uninterrupted = make(config);
    for (int step = 0; step < 6; ++step) uninterrupted->train_batch(micro_batches(step));
    uninterrupted->updater().save_checkpoint(folder.path(), "global_step6", R"({"epoch": 3})");

    model.weight_seed = 2;
    const auto resumed = make(config);
    EXPECT_EQ(resumed->updater().load_checkpoint(folder.path(), ""), R"({"epoch": 3})");
    EXPECT_EQ(resumed->updater().global_step(), uninterrupted->updater().global_step());
    for (int step = 6; step < 10; ++step) {
      const StepResult expected = uninterrupted->train_batch(micro_batches(step));
      const StepResult seen = resumed->train_batch(micro_batches(step));
      EXPECT_EQ(seen.loss, expected.loss) << precision << "step " << step;
      EXPECT_EQ(seen.skipped, expected.skipped);
      EXPECT_EQ(seen.loss_scale, expected.loss_scale);
      EXPECT_EQ(seen.bits, expected.bits);
    }
    EXPECT_TRUE(same_bits(masters(*resumed), masters(*uninterrupted)));
    EXPECT_EQ(resumed->evaluate(tiny_batch(100, 4)).logits,
              uninterrupted->evaluate(tiny_batch(100, 4)).logits);
  }
}

TEST_F(CheckpointTest, DamageIsFoundBeforeAnythingIsLoaded) {
  const auto writer = make(config_with_lr("1e-3"));
  writer->train_batch(micro_batches(0));
  model.weight_seed = 2;
  const auto reader = make(config_with_lr("1e-3"));
  for (const char* name :
       {"model.safetensors", "optimizer.safetensors", "state.json", "checksums.json"}) {
    const fs::path file = folder.path() / "good" / name;
    const auto restore = [&] { writer->updater().save_checkpoint(folder.path(), "good", "{}"); };

    restore();
    const auto size = fs::file_size(file);
    std::fstream stream(file, std::ios::in | std::ios::out | std::ios::binary);
    stream.seekg(static_cast<std::streamoff>(size / 2));
    const char byte = static_cast<char>(stream.get());
    stream.seekp(static_cast<std::streamoff>(size / 2));
    stream.put(static_cast<char>(byte ^ 0x10));
    stream.close();
    EXPECT_THAT(load_error(*reader), HasSubstr("good/")) << "flipped byte in " << name;

    restore();
    fs::resize_file(file, size / 2);
    EXPECT_THAT(load_error(*reader), HasSubstr(name)) << "cut short";

    restore();
    fs::remove(file);
    EXPECT_THAT(load_error(*reader), AllOf(HasSubstr(name), HasSubstr("cannot read"))) << "missing";
  }
}

TEST_F(CheckpointTest, OtherConfigNamesTheKeys) {
  make(config_with_lr("1e-3"))->updater().save_checkpoint(folder.path(), "a", "{}");
  EXPECT_THAT(load_error(*make(config_with_lr("2e-3"))),
              HasSubstr("optimizer.params.lr: 0.001 then, 0.002 now"));
  EXPECT_EQ(load_error(*make(R"("steps_per_print": 3, )" + config_with_lr("1e-3"))), "no error");
}

TEST_F(CheckpointTest, OtherModelNamesTheTensor) {
  make(config_with_lr("1e-3"))->updater().save_checkpoint(folder.path(), "a", "{}");
  model.num_layers = 3;
  EXPECT_THAT(load_error(*make(config_with_lr("1e-3"))), HasSubstr("bert.encoder.layer.2"));
  model.num_layers = 1;
  EXPECT_THAT(load_error(*make(config_with_lr("1e-3"))), HasSubstr("another model"));
}

TEST_F(CheckpointTest, TagsAndFolders) {
  const auto engine = make(config_with_lr("1e-3"));
  EXPECT_THAT(load_error(*engine), HasSubstr("no file 'latest'"));
  EXPECT_THROW(engine->updater().save_checkpoint(folder.path(), "../escape", "{}"),
               CheckpointError);
  engine->updater().save_checkpoint(folder.path(), "one", "{}");
  engine->updater().save_checkpoint(folder.path(), "two", "{}");
  std::ifstream latest(folder.path() / "latest");
  EXPECT_EQ(std::string(std::istreambuf_iterator<char>(latest), {}), "two");
  EXPECT_THAT(load_error(*engine, "three"), HasSubstr("no such checkpoint"));
  EXPECT_EQ(engine->updater().load_checkpoint(folder.path(), "one"), "{}");
  std::ofstream(folder.path() / "file") << "x";
  EXPECT_THROW(engine->updater().save_checkpoint(folder.path() / "file", "a", "{}"),
               CheckpointError);
}

// Not a test of its own: the process that KilledWriter kills.
TEST(CheckpointWriter, WritesUntilKilled) {
  const char* path = std::getenv(kFolderVariable);
  if (path == nullptr) GTEST_SKIP() << "started by KilledWriterLeavesTheLastGoodCheckpoint";
  SingleProcess communicator;
  const auto engine = tiny_engine(config_with_lr("1e-3"), communicator, kModel);
  for (int step = 0;; ++step) {
    engine->train_batch(micro_batches(step));
    // One tag is replaced over and over, another is new each time.
    engine->updater().save_checkpoint(path, step % 2 == 0 ? "same" : concat("step", step), "{}");
  }
}

TEST_F(CheckpointTest, KilledWriterLeavesTheLastGoodCheckpoint) {
  const auto reader = make(config_with_lr("1e-3"));
  for (int round = 0; round < 5; ++round) {
    const pid_t child = ::fork();
    ASSERT_GE(child, 0);
    if (child == 0) {
      ::setenv(kFolderVariable, folder.path().c_str(), 1);
      ::execl("/proc/self/exe", "checkpoint_test", "--gtest_filter=CheckpointWriter.*",
              "--gtest_brief=1", static_cast<char*>(nullptr));
      ::_exit(127);
    }
    for (int wait = 0; wait < 2000 && !fs::exists(folder.path() / "latest"); ++wait) {
      std::this_thread::sleep_for(std::chrono::milliseconds(5));
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(60 + 37 * round));
    ASSERT_EQ(::kill(child, SIGKILL), 0);
    int status = 0;
    ASSERT_EQ(::waitpid(child, &status, 0), child);
    ASSERT_TRUE(WIFSIGNALED(status));
    EXPECT_EQ(reader->updater().load_checkpoint(folder.path(), ""), "{}");
    EXPECT_GT(reader->updater().global_step(), 0);
  }
}

}  // namespace
}  // namespace bitfall
