// Updater::step enqueues the update before it knows whether the device skips it: what a skipped
// step leaves, bit for bit.
#include "engine/updater.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "core/error.h"
#include "csrc_cpu/cpu_backend.h"

namespace bitfall {
namespace {

const std::vector<ParameterSpec> kSpecs = {
    {"embedding.weight", Shape{6, 16}},         {"bert.encoder.layer.0.weight", Shape{8, 16}, 0},
    {"bert.encoder.layer.0.bias", Shape{8}, 0}, {"bert.encoder.layer.1.weight", Shape{16, 8}, 1},
    {"classifier.weight", Shape{2, 8}},
};

/// Drops at steps 1, 2 and 4, each with other random numbers.
const std::string kQuantize = R"("gradient_clipping": 0.5, "quantize_training": {"enabled": true,
    "quantize_groups": 4, "quantize_bits": {"start_bits": 8, "target_bits": 4},
    "quantize_schedule": {"quantize_period": 1, "schedule_offset": 0},
    "quantize_algo": {"rounding": "stochastic"})";
const std::string kFp16 =
    R"("fp16": {"enabled": true, "initial_scale_power": 16, "hysteresis": 1}, )";

/// An Updater with gradients that the test makes.
class Training {
 public:
  explicit Training(const std::string& ds_config, const UpdateRule& rule = {})
      : updater_(backend_, communicator_, parse(ds_config), kSpecs, fill_masters, rule) {}

  Updater& updater() { return updater_; }

  /// One step with the gradient number `seed`, one element of which becomes `fault` if not zero.
  StepResult step(int seed, float fault = 0, const MakeHessian& make_hessian = {},
                  const Updater::UpdateMasters& update_masters = {}) {
    std::mt19937 generator(static_cast<std::uint32_t>(seed));
    std::normal_distribution<float> normal;
    const auto scale = static_cast<float>(updater_.loss_scale());
    const std::vector<Tensor> gradients = updater_.gradient_views();
    for (const Tensor& gradient : gradients) {
      for (std::int64_t i = 0; i < gradient.numel(); ++i) {
        gradient.as<float>()[i] = scale * normal(generator);
      }
    }
    if (fault != 0) gradients[3].as<float>()[7] = fault;
    for (const int block : {1, 0, kNoBlock}) updater_.start_reduction(block);
    loss_ = static_cast<float>(seed);
    return updater_.step({&loss_, DType::f32, Shape{1}, Device::cpu}, make_hessian, update_masters);
  }

  /// The bytes of masters, moments and working weights.
  std::string weights() {
    const ParameterStore& store = updater_.store();
    std::vector<Tensor> tensors = {store.master(), store.working()};
    if (Optimizer* const adam = updater_.optimizer()) {
      tensors.insert(tensors.end(), {adam->exp_avg(), adam->exp_avg_sq()});
    }
    std::string bytes;
    for (const Tensor& tensor : tensors) bytes.append(tensor.as<char>(), tensor.bytes());
    return bytes;
  }

 private:
  static CompletedConfig parse(const std::string& ds_config) {
    const FlagValues flags = {
        {"bitfall.lr_scheduler_type", {"--lr_scheduler_type", "\"constant\"", false}},
        {"bitfall.world_size", {"--world_size", "1", true}},
        {"optimizer.params.lr", {"--learning_rate", "1e-2", false}}};
    return parse_config(R"({"train_batch_size": 1, )" + ds_config + "}", "test.json", flags);
  }
  static void fill_masters(Backend&, const ParameterStore& store) {
    for (std::int64_t i = 0; i < store.master().numel(); ++i) {
      store.master().as<float>()[i] = std::sin(static_cast<float>(i));
    }
  }

  CpuBackend backend_;
  SingleProcess communicator_;
  Updater updater_;
  float loss_ = 0;
};

/// Before every step, those with a drop among them, one that overflows.
void expect_overflows_leave_no_trace(const std::string& ds_config) {
  Training undisturbed(ds_config), disturbed(ds_config);
  std::vector<std::size_t> drops;
  for (int step = 0; step < 6; ++step) {
    SCOPED_TRACE(step);
    const std::string before = disturbed.weights();
    const std::vector<int> bits = disturbed.updater().bits_per_state();
    const double scale = disturbed.updater().loss_scale();
    const StepResult skipped = disturbed.step(100 + step, step % 2 == 0 ? INFINITY : NAN);
    EXPECT_TRUE(skipped.skipped);
    EXPECT_EQ(skipped.step, step);
    EXPECT_EQ(skipped.loss, 100 + step);
    EXPECT_FALSE(std::isfinite(skipped.grad_norm));
    EXPECT_TRUE(skipped.drops.empty());
    EXPECT_EQ(skipped.bits, bits);
    EXPECT_EQ(skipped.loss_scale, scale);
    EXPECT_EQ(disturbed.updater().loss_scale(), scale / 2);
    EXPECT_EQ(disturbed.updater().optimizer()->steps(), step);
    EXPECT_TRUE(disturbed.weights() == before);

    const StepResult expected = undisturbed.step(step), seen = disturbed.step(step);
    EXPECT_FALSE(seen.skipped);
    EXPECT_EQ(seen.step, step + 1);
    EXPECT_EQ(seen.grad_norm, expected.grad_norm);
    EXPECT_EQ(seen.bits, expected.bits);
    EXPECT_TRUE(disturbed.weights() == undisturbed.weights());
    EXPECT_FALSE(disturbed.weights() == before);
    drops.push_back(seen.drops.size());
  }
  EXPECT_EQ(drops, (std::vector<std::size_t>{3, 3, 0, 3, 0, 0}));
  EXPECT_EQ(disturbed.updater().skipped_steps(), 6);
}

TEST(Updater, AnOverflowIsAsIfTheStepHadNotBeenEnqueued) {
  expect_overflows_leave_no_trace(kFp16 + kQuantize + "}");
}

TEST(Updater, AnOverflowDoesNotBlendTheWeightsFurther) {
  expect_overflows_leave_no_trace(kFp16 + kQuantize + R"(,
      "fp16_mixed_quantize": {"enabled": true, "quantize_change_ratio": 0.25}})");
}

TEST(Updater, ARefusedGradientChangesNoWeight) {
  const std::string decay = R"("optimizer": {"params": {"weight_decay": 0.1}}, )";
  for (const std::string& config :
       {concat(R"("bf16": {"enabled": true}, )", decay, kQuantize, "}"),
        concat(decay, kQuantize, "}"), concat(decay, R"("gradient_clipping": 1.0)")}) {
    Training run(config);
    run.step(0);
    const std::string before = run.weights();
    const std::vector<int> bits = run.updater().bits_per_state();
    try {
      run.step(1, INFINITY);
      FAIL() << "no error";
    } catch (const TrainingError& error) {
      EXPECT_NE(
          std::string(error.what())
              .find("step 2: the gradient of 'bert.encoder.layer.1.weight' is not finite (loss 1)"),
          std::string::npos)
          << error.what();
    }
    EXPECT_TRUE(run.weights() == before);
    EXPECT_EQ(run.updater().bits_per_state(), bits);
    EXPECT_EQ(run.updater().optimizer()->steps(), 1);
    EXPECT_EQ(run.updater().global_step(), 1);
  }
}

TEST(Updater, NoEigenvaluesForAnOverflow) {
  Training run(kFp16 + kQuantize + R"(, "eigenvalue": {"enabled": true}})");
  const std::string before = run.weights();
  ASSERT_TRUE(run.updater().needs_eigenvalues());
  const StepResult result = run.step(0, INFINITY, []() -> std::unique_ptr<HessianSource> {
    throw TrainingError("products for a step that is skipped");
  });
  EXPECT_TRUE(result.skipped);
  EXPECT_TRUE(run.weights() == before);
}

TEST(Updater, TheCallersUpdateWaitsForTheDecision) {
  Training run(R"("gradient_clipping": 0.5, )" + kFp16 + R"("zero_optimization": {"stage": 0})",
               {UpdateRule::Kind::caller, {}});
  int updates = 0;
  const auto update = [&] {
    ++updates;
    double squares = 0;
    for (const Tensor& gradient : run.updater().gradient_views()) {
      for (std::int64_t i = 0; i < gradient.numel(); ++i) {
        squares += std::pow(double{gradient.as<float>()[i]}, 2);
      }
    }
    EXPECT_NEAR(std::sqrt(squares), 0.5, 1e-6);  // unscaled and clipped
  };
  EXPECT_TRUE(run.step(0, NAN, {}, update).skipped);
  EXPECT_EQ(updates, 0);
  EXPECT_GT(run.step(0, 0, {}, update).grad_norm, 1);
  EXPECT_EQ(updates, 1);
}

}  // namespace
}  // namespace bitfall
