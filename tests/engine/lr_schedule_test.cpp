#include "engine/lr_schedule.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <array>
#include <cmath>

#include "core/error.h"

namespace bitfall {
namespace {

using ::testing::HasSubstr;

constexpr double kRate = 2e-3;

struct Golden {
  const char* type;
  double num_warmup_steps;
  std::array<double, 7> rates;
};

constexpr std::array<std::int64_t, 7> kSteps = {0, 1, 3, 4, 7, 10, 12};

// From transformers 5.23 get_scheduler, 10 training steps.
constexpr Golden kGoldens[] = {
    {"linear",
     3,
     {0.0, 0.0006666666666666666, 0.002, 0.0017142857142857142, 0.0008571428571428571, 0.0, 0.0}},
    {"linear", 0, {0.002, 0.0018000000000000002, 0.0014, 0.0012, 0.0006, 0.0, 0.0}},
    {"cosine",
     3,
     {0.0, 0.0006666666666666666, 0.002, 0.001900968867902419, 0.0007774790660436857, 0.0,
      0.0003765101981412663}},
    {"cosine",
     0,
     {0.002, 0.0019510565162951536, 0.0015877852522924731, 0.0013090169943749475,
      0.00041221474770752696, 0.0, 0.00019098300562505244}},
    {"cosine_with_restarts",
     3,
     {0.0, 0.0006666666666666666, 0.002, 0.001900968867902419, 0.0007774790660436857, 0.0, 0.0}},
    {"cosine_with_restarts",
     0,
     {0.002, 0.0019510565162951536, 0.0015877852522924731, 0.0013090169943749475,
      0.00041221474770752696, 0.0, 0.0}},
    {"polynomial",
     3,
     {0.0, 0.0006666666666666666, 0.002, 0.0017143000000000004, 0.0008572000000000001, 1e-07,
      1e-07}},
    {"polynomial",
     0,
     {0.002, 0.0018000100000000003, 0.0014000299999999998, 0.00120004, 0.0006000700000000001, 1e-07,
      1e-07}},
    {"constant", 3, {0.002, 0.002, 0.002, 0.002, 0.002, 0.002, 0.002}},
    {"constant", 0, {0.002, 0.002, 0.002, 0.002, 0.002, 0.002, 0.002}},
    {"constant_with_warmup", 3, {0.0, 0.0006666666666666666, 0.002, 0.002, 0.002, 0.002, 0.002}},
    {"constant_with_warmup", 0, {0.002, 0.002, 0.002, 0.002, 0.002, 0.002, 0.002}},
    {"inverse_sqrt",
     3,
     {0.0, 0.0006666666666666666, 0.002, 0.0017320508075688774, 0.001309307341415954,
      0.0010954451150103322, 0.001}},
    {"inverse_sqrt",
     0,
     {0.002, 0.0019999000074993755, 0.0019997000674831294, 0.0019996001199600144,
      0.0019993003672857564, 0.0019990007493755463, 0.001998801078921133}},
};

TEST(LrSchedule, EqualsHuggingFace) {
  for (const Golden& golden : kGoldens) {
    SchedulerConfig config;
    config.type = golden.type;
    config.params = {{"num_warmup_steps", golden.num_warmup_steps}, {"num_training_steps", 10}};
    const LrSchedule schedule(config, kRate);
    for (std::size_t i = 0; i < kSteps.size(); ++i) {
      EXPECT_NEAR(schedule.rate(kSteps[i]), golden.rates[i], 1e-15)
          << golden.type << " warmup " << golden.num_warmup_steps << " step " << kSteps[i];
    }
  }
}

SchedulerConfig warmup(const char* type, const char* warmup_type) {
  SchedulerConfig config;
  config.type = type;
  config.warmup_type = warmup_type;
  config.params = {{"warmup_min_lr", 1e-4}, {"warmup_max_lr", 1e-3},    {"warmup_num_steps", 4},
                   {"total_num_steps", 10}, {"warmup_min_ratio", 0.25}, {"cos_min_ratio", 0.1}};
  return config;
}

// rate(t) uses last_batch_iteration = t - 1: the scheduler is stepped after each update.
TEST(LrSchedule, WarmupLr) {
  const LrSchedule log(warmup("WarmupLR", "log"), kRate);
  EXPECT_DOUBLE_EQ(log.rate(0), 1e-4);
  EXPECT_DOUBLE_EQ(log.rate(1), 1e-4);  // log(1) = 0
  EXPECT_DOUBLE_EQ(log.rate(2), 1e-4 + 9e-4 * std::log(2.0) / std::log(4.0));
  EXPECT_DOUBLE_EQ(log.rate(4), 1e-3);  // log(4) / log(4)
  EXPECT_DOUBLE_EQ(log.rate(1000), 1e-3);
  const LrSchedule linear(warmup("WarmupLR", "linear"), kRate);
  EXPECT_DOUBLE_EQ(linear.rate(0), 1e-4);
  EXPECT_DOUBLE_EQ(linear.rate(3), 1e-4 + 9e-4 * 2 / 4);
  EXPECT_DOUBLE_EQ(linear.rate(5), 1e-3);
}

TEST(LrSchedule, WarmupOfLessThanTwoStepsCountsAsTwo) {
  SchedulerConfig config = warmup("WarmupLR", "log");
  config.params["warmup_num_steps"] = 0;
  const LrSchedule schedule(config, kRate);
  EXPECT_DOUBLE_EQ(schedule.rate(1), 1e-4);
  EXPECT_DOUBLE_EQ(schedule.rate(2), 1e-3);
}

TEST(LrSchedule, WarmupDecayLr) {
  const LrSchedule schedule(warmup("WarmupDecayLR", "linear"), kRate);
  EXPECT_DOUBLE_EQ(schedule.rate(2), 1e-4 + 9e-4 / 4);
  EXPECT_DOUBLE_EQ(schedule.rate(5), 1e-3);                   // last = 4: (10 - 4) / 6
  EXPECT_DOUBLE_EQ(schedule.rate(8), 1e-4 + 9e-4 * 3.0 / 6);  // last = 7
  EXPECT_DOUBLE_EQ(schedule.rate(100), 1e-4);
}

TEST(LrSchedule, WarmupCosineLr) {
  const LrSchedule schedule(warmup("WarmupCosineLR", "linear"), kRate);
  EXPECT_DOUBLE_EQ(schedule.rate(0), 0.0);
  EXPECT_DOUBLE_EQ(schedule.rate(3), kRate * (0.25 + 0.75 * 2 / 4));
  EXPECT_NEAR(schedule.rate(7), kRate * (0.1 + 0.9 * 0.5), 1e-15);  // last = 6: half of 6 steps
  EXPECT_NEAR(schedule.rate(10), kRate * 0.1, 1e-15);
}

TEST(LrSchedule, OneCycle) {
  SchedulerConfig config;
  config.type = "OneCycle";
  config.params = {{"cycle_min_lr", 1e-4},       {"cycle_max_lr", 1e-3},
                   {"cycle_first_step_size", 4}, {"cycle_second_step_size", 6},
                   {"decay_step_size", 5},       {"decay_lr_rate", 0.5}};
  const LrSchedule schedule(config, kRate);
  EXPECT_NEAR(schedule.rate(0), 1e-4, 1e-15);
  EXPECT_NEAR(schedule.rate(2), 5.5e-4, 1e-15);
  EXPECT_NEAR(schedule.rate(4), 1e-3, 1e-15);
  EXPECT_NEAR(schedule.rate(7), 5.5e-4, 1e-15);
  EXPECT_NEAR(schedule.rate(10), 1e-4, 1e-15);
  EXPECT_NEAR(schedule.rate(20), 1e-4 / (1 + 0.5 * 10 / 5), 1e-15);
  config.params["decay_step_size"] = 0;
  EXPECT_DOUBLE_EQ(LrSchedule(config, kRate).rate(20), 1e-4);
}

TEST(LrSchedule, LrRangeTest) {
  SchedulerConfig config;
  config.type = "LRRangeTest";
  config.params = {{"lr_range_test_min_lr", 1e-3},
                   {"lr_range_test_step_size", 4},
                   {"lr_range_test_step_rate", 2},
                   {"lr_range_test_staircase", 0}};
  EXPECT_DOUBLE_EQ(LrSchedule(config, kRate).rate(0), 1e-3);
  EXPECT_DOUBLE_EQ(LrSchedule(config, kRate).rate(6), 1e-3 * (1 + 2 * 1.5));
  config.params["lr_range_test_staircase"] = 1;
  EXPECT_DOUBLE_EQ(LrSchedule(config, kRate).rate(6), 1e-3 * (1 + 2 * 1.0));
}

TEST(LrSchedule, AsksForTheNumberOfTrainingSteps) {
  SchedulerConfig config;
  config.params = {{"num_warmup_steps", 0}};
  try {
    LrSchedule schedule(config, kRate);
    FAIL() << "expected an error";
  } catch (const ConfigError& error) {
    EXPECT_THAT(error.what(), HasSubstr("scheduler.params.num_training_steps: missing"));
  }
}

}  // namespace
}  // namespace bitfall
