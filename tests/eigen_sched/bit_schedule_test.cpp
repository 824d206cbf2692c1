// Spec A2, A3: the worked table of DeepSpeed's schedules, the closed form against stepping, and the
// state that a checkpoint keeps.
#include "eigen_sched/bit_schedule.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <limits>
#include <random>

#include "core/error.h"

namespace bitfall {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;

QuantizeConfig config_with(ScheduleClock clock, std::int64_t offset, std::int64_t period,
                           int start_bits, int target_bits) {
  QuantizeConfig config;
  config.enabled = true;
  config.clock = clock;
  config.schedule_offset = offset;
  config.groups = {{.name = "",
                    .start_bits = start_bits,
                    .target_bits = target_bits,
                    .quantize_period = period,
                    .modules = {},
                    .exclude_modules = {}}};
  return config;
}

std::vector<BitStateSpec> layers(int count) {
  std::vector<BitStateSpec> specs;
  for (int block = 0; block < count; ++block)
    specs.push_back({"encoder.layer." + std::to_string(block), block, 0});
  specs.push_back({"other", -1, 0});
  return specs;
}

/// A normalized eigenvalue whose factor is `factor`.
double eigenvalue_of(int factor) { return factor == 5 ? 1.0 : (factor - 1) * 0.25 + 0.1; }

std::vector<std::int64_t> steps_of(const PlannedState& state) {
  std::vector<std::int64_t> steps;
  for (const auto& [bits, step] : state.drops) steps.push_back(step);
  return steps;
}

std::vector<std::int64_t> planned_steps(ScheduleClock clock, int layer_num, int factor) {
  const QuantizeConfig config = config_with(clock, 100, 100, 16, 8);
  const std::vector<double> eigenvalues(12, eigenvalue_of(factor));
  return steps_of(plan_bits(config, layers(12), layer_num, eigenvalues)[3]);
}

TEST(BitScheduleTable, DeepSpeedCounterWithoutEigenvalues) {
  EXPECT_THAT(planned_steps(ScheduleClock::deepspeed_0_6, 0, 1),
              ElementsAre(17, 34, 51, 84, 151, 284, 551, 1084, 2151));
}

TEST(BitScheduleTable, DeepSpeedCounterWithTwelveLayers) {
  const auto clock = ScheduleClock::deepspeed_0_6;
  EXPECT_THAT(planned_steps(clock, 12, 1), ElementsAre(2, 4, 5, 8, 14, 25, 47, 91, 180));
  EXPECT_THAT(planned_steps(clock, 12, 2), ElementsAre(2, 4, 8, 25, 91, 358, 1425, 5691, 22758));
  EXPECT_THAT(planned_steps(clock, 12, 3),
              ElementsAre(2, 4, 11, 52, 302, 1802, 10802, 64802, 388802));
  EXPECT_THAT(planned_steps(clock, 12, 4),
              ElementsAre(2, 4, 14, 91, 714, 5691, 45514, 364091, 2912714));
  EXPECT_THAT(planned_steps(clock, 12, 5),
              ElementsAre(2, 4, 16, 141, 1391, 13891, 138891, 1388891, 13888891));
}

TEST(BitScheduleTable, DocumentedClock) {
  const auto clock = ScheduleClock::step;
  EXPECT_THAT(planned_steps(clock, 12, 1),
              ElementsAre(101, 200, 300, 500, 900, 1700, 3300, 6500, 12900));
  EXPECT_THAT(planned_steps(clock, 12, 2),
              ElementsAre(101, 200, 500, 1700, 6500, 25700, 102500, 409700, 1638500));
  EXPECT_THAT(planned_steps(clock, 12, 3),
              ElementsAre(101, 200, 700, 3700, 21700, 129700, 777700, 4665700, 27993700));
  EXPECT_THAT(planned_steps(clock, 12, 4),
              ElementsAre(101, 200, 900, 6500, 51300, 409700, 3276900, 26214500, 209715300));
  EXPECT_THAT(planned_steps(clock, 12, 5),
              ElementsAre(101, 200, 1100, 10100, 100100, 1000100, 10000100, 100000100, 1000000100));
}

TEST(BitScheduleTable, PublishedGlueRecipes) {
  const auto last_step = [](std::int64_t period, int start_bits, int layer_num, int factor) {
    const QuantizeConfig config =
        config_with(ScheduleClock::deepspeed_0_6, 0, period, start_bits, 8);
    const std::vector<double> eigenvalues(12, eigenvalue_of(factor));
    return plan_bits(config, layers(12), layer_num, eigenvalues)[0].drops.back().second;
  };
  EXPECT_EQ(last_step(10, 12, 12, 5), 139);    // MRPC
  EXPECT_EQ(last_step(8, 12, 12, 5), 112);     // CoLA, RTE, WNLI
  EXPECT_EQ(last_step(18, 12, 12, 5), 250);    // QQP
  EXPECT_EQ(last_step(12, 14, 12, 5), 16667);  // MNLI
  EXPECT_EQ(last_step(10, 12, 0, 1), 14);      // STS-B
  EXPECT_EQ(last_step(64, 12, 0, 1), 86);      // QNLI
  EXPECT_EQ(last_step(400, 12, 0, 1), 534);    // SST-2
}

TEST(BitScheduleTable, OneBitPerStepWherePeriodsAreShort) {
  // DeepSpeed 0.6 itself drops several bits within one call here: 12 -> 9 at step 1.
  const QuantizeConfig config = config_with(ScheduleClock::deepspeed_0_6, 0, 10, 12, 8);
  EXPECT_THAT(steps_of(plan_bits(config, layers(12), 12, {})[0]), ElementsAre(1, 1, 2, 3, 4));
  const QuantizeConfig unit = config_with(ScheduleClock::step, 0, 1, 16, 8);
  EXPECT_THAT(steps_of(plan_bits(unit, layers(1), 1, {})[0]),
              ElementsAre(1, 1, 2, 4, 8, 16, 32, 64, 128));
}

TEST(BitScheduleTable, StepsBeyondTheIntegersAreNever) {
  QuantizeConfig config =
      config_with(ScheduleClock::step, 0, std::numeric_limits<std::int64_t>::max(), 16, 3);
  const std::vector<double> eigenvalues(12, 1.0);
  const auto never = std::numeric_limits<std::int64_t>::max();
  EXPECT_EQ(plan_bits(config, layers(12), 12, eigenvalues)[0].drops.back().second, never);
  config.schedule_offset = never;
  EXPECT_EQ(plan_bits(config, layers(12), 12, eigenvalues)[0].drops.front().second, never);
}

/// First step of each width, found by stepping.
std::vector<std::vector<std::int64_t>> simulate(const QuantizeConfig& config,
                                                const std::vector<BitStateSpec>& specs,
                                                int layer_num,
                                                const std::vector<double>& eigenvalues,
                                                std::int64_t steps) {
  BitSchedule schedule(config, specs, layer_num);
  std::vector<std::vector<std::int64_t>> firsts(specs.size());
  for (std::int64_t step = 1; step <= steps; ++step) {
    const bool expected = schedule.block_would_drop();
    const std::vector<BitDrop> drops = schedule.advance(step, eigenvalues);
    bool block_dropped = false;
    for (std::size_t state = 0; state < specs.size(); ++state) {
      if (schedule.quantizing() && firsts[state].empty()) firsts[state].push_back(step);
    }
    for (const BitDrop& drop : drops) {
      block_dropped |= specs[drop.state].block >= 0;
      EXPECT_TRUE(schedule.quantizing());
      EXPECT_EQ(drop.step, step);
      EXPECT_EQ(drop.new_bits, drop.old_bits - 1);
      EXPECT_EQ(drop.new_bits, schedule.bits(drop.state));
      EXPECT_EQ(drop.next_threshold == 0, drop.new_bits == config.groups[0].target_bits);
      firsts[drop.state].push_back(step);
    }
    EXPECT_EQ(expected, block_dropped) << "step " << step;
  }
  return firsts;
}

TEST(BitSchedule, SteppingMatchesTheClosedForm) {
  std::mt19937 random(20210524);
  const auto draw = [&](int low, int high) {
    return low + static_cast<int>(random() % static_cast<unsigned>(high - low + 1));
  };
  constexpr std::int64_t kSteps = 300;
  for (int trial = 0; trial < 400; ++trial) {
    const int start_bits = draw(1, 16), num_layers = draw(1, 4);
    const QuantizeConfig config = config_with(
        draw(0, 1) == 0 ? ScheduleClock::step : ScheduleClock::deepspeed_0_6,
        draw(0, 1) * draw(0, 80), draw(1, 1 << draw(0, 6)), start_bits, draw(1, start_bits));
    const int layer_num = draw(0, 1) * num_layers;
    std::vector<double> eigenvalues;
    for (int block = 0; block < num_layers * (layer_num > 0); ++block)
      eigenvalues.push_back(draw(0, 100) / 100.0);
    const std::vector<BitStateSpec> specs = layers(num_layers);
    const auto simulated = simulate(config, specs, layer_num, eigenvalues, kSteps);
    const auto plan = plan_bits(config, specs, layer_num, eigenvalues);
    for (std::size_t state = 0; state < specs.size(); ++state) {
      std::vector<std::int64_t> expected = steps_of(plan[state]);
      std::erase_if(expected, [](std::int64_t step) { return step > kSteps; });
      EXPECT_EQ(simulated[state], expected)
          << "trial " << trial << " state " << specs[state].name << " period "
          << config.groups[0].quantize_period << " offset " << config.schedule_offset;
    }
  }
}

TEST(BitSchedule, FactorIsTheLastKnownAndOtherKeepsOne) {
  BitSchedule schedule(config_with(ScheduleClock::step, 0, 10, 16, 8), layers(2), 2);
  EXPECT_TRUE(schedule.advance(1, std::vector<double>{0.3, 1.0}).empty());
  for (int step = 2; step < 10; ++step) EXPECT_TRUE(schedule.advance(step, {}).empty());
  EXPECT_TRUE(schedule.block_would_drop());
  const std::vector<BitDrop> drops = schedule.advance(10, {});
  ASSERT_EQ(drops.size(), 3u);
  EXPECT_EQ(drops[0].next_threshold, 40);   // f = 2
  EXPECT_EQ(drops[1].next_threshold, 100);  // f = 5
  EXPECT_EQ(drops[2].next_threshold, 20);   // other
  EXPECT_EQ(schedule.factor(1), 5);
  EXPECT_EQ(schedule.factor(2), 1);
}

TEST(BitSchedule, OtherAloneNeedsNoEigenvalues) {
  BitSchedule schedule(config_with(ScheduleClock::step, 0, 1, 16, 8), {{"other", -1, 0}}, 2);
  EXPECT_FALSE(schedule.block_would_drop());
  EXPECT_EQ(schedule.advance(1, {}).size(), 1u);
}

TEST(BitSchedule, MixFallsEachStepAndRestartsAtADrop) {
  QuantizeConfig config = config_with(ScheduleClock::step, 2, 3, 8, 7);
  config.mixed_enabled = true;
  config.change_ratio = 0.25;
  BitSchedule schedule(config, {{"other", -1, 0}}, 0);
  std::vector<double> mixes;
  for (int step = 1; step <= 10; ++step) {
    schedule.advance(step, {});
    mixes.push_back(schedule.mix(0));
  }
  EXPECT_THAT(mixes, ElementsAre(0.75, 0.5, 0.25, 0, 1, 0.75, 0.5, 0.25, 0, 0));
  config.mixed_enabled = false;
  EXPECT_EQ(BitSchedule(config, {{"other", -1, 0}}, 0).mix(0), 0);
}

TEST(BitSchedule, RestoredStateContinuesLikeTheUninterruptedRun) {
  const QuantizeConfig config = config_with(ScheduleClock::deepspeed_0_6, 30, 7, 16, 4);
  const std::vector<double> eigenvalues{0.9, 0.1};
  BitSchedule whole(config, layers(2), 2), first(config, layers(2), 2);
  for (int step = 1; step <= 20; ++step) {
    whole.advance(step, eigenvalues);
    if (step <= 9) first.advance(step, eigenvalues);
  }
  BitSchedule second(config, layers(2), 2);
  second.restore(first.state());
  for (int step = 10; step <= 20; ++step) second.advance(step, eigenvalues);
  EXPECT_EQ(second.state().ticks, whole.state().ticks);
  for (std::size_t state = 0; state < 3; ++state) {
    EXPECT_EQ(second.bits(state), whole.bits(state));
    EXPECT_EQ(second.state().states[state].period, whole.state().states[state].period);
  }
}

TEST(BitSchedule, RestoreRefusesWhatDoesNotFit) {
  BitSchedule schedule(config_with(ScheduleClock::step, 0, 10, 16, 8), layers(1), 1);
  const BitScheduleState good = schedule.state();
  const auto refuses = [&](auto spoil) {
    BitScheduleState bad = good;
    spoil(bad);
    EXPECT_THROW(schedule.restore(bad), CheckpointError);
  };
  refuses([](auto& state) { state.states.pop_back(); });
  refuses([](auto& state) { state.ticks = -1; });
  refuses([](auto& state) { state.states[0].bits = 7; });
  refuses([](auto& state) { state.states[0].bits = 17; });
  refuses([](auto& state) { state.states[0].period = 0; });
  refuses([](auto& state) { state.states[0].period = std::numeric_limits<double>::quiet_NaN(); });
  refuses([](auto& state) { state.states[0].factor = 6; });
  refuses([](auto& state) { state.states[0].mix = 1.5; });
  schedule.restore(good);
}

TEST(BitSchedule, RefusesEigenvaluesThatAreMissingOrNotNormalized) {
  BitSchedule schedule(config_with(ScheduleClock::step, 0, 10, 16, 8), layers(2), 2);
  const BitScheduleState before = schedule.state();
  const auto advance = [&](std::vector<double> values) { schedule.advance(1, values); };
  EXPECT_THROW(advance({0.5}), ShapeError);
  EXPECT_THROW(advance({0.5, 1.5}), ShapeError);
  EXPECT_THROW(advance({std::numeric_limits<double>::quiet_NaN(), 0.5}), ShapeError);
  EXPECT_EQ(schedule.state().ticks, before.ticks);
}

TEST(BitSchedule, RefusesImpossibleConfigs) {
  const auto build = [](const QuantizeConfig& config) { BitSchedule(config, layers(1), 1); };
  EXPECT_THROW(build(config_with(ScheduleClock::step, 0, 0, 16, 8)), ConfigError);
  EXPECT_THROW(build(config_with(ScheduleClock::step, -1, 10, 16, 8)), ConfigError);
  EXPECT_THROW(build(config_with(ScheduleClock::step, 0, 10, 8, 16)), ConfigError);
  EXPECT_THROW(build(config_with(ScheduleClock::step, 0, 10, 8, 0)), ConfigError);
}

TEST(LongestPeriod, IsTheLastThatReaches) {
  // The tutorial's own sample: 16 to 8 bits, period 400, MRPC for 345 steps.
  const QuantizeConfig tutorial = config_with(ScheduleClock::step, 0, 400, 16, 8);
  EXPECT_EQ(longest_period_that_reaches(tutorial, 0, 0, 1, 345), 2);  // 2 * 2^7 = 256
  EXPECT_EQ(longest_period_that_reaches(tutorial, 0, 12, 5, 345), 0);
  EXPECT_EQ(longest_period_that_reaches(config_with(ScheduleClock::step, 0, 1, 8, 8), 0, 0, 1, 9),
            std::numeric_limits<std::int64_t>::max());

  std::mt19937 random(7);
  for (int trial = 0; trial < 200; ++trial) {
    const int factor = 1 + static_cast<int>(random() % 5);
    const auto steps = static_cast<std::int64_t>(random() % 100000);
    QuantizeConfig config =
        config_with(random() % 2 == 0 ? ScheduleClock::step : ScheduleClock::deepspeed_0_6,
                    random() % 50, 1, 8, 8 - 1 - static_cast<int>(random() % 5));
    const std::int64_t period = longest_period_that_reaches(config, 0, 12, factor, steps);
    const auto last = [&](std::int64_t candidate) {
      config.groups[0].quantize_period = candidate;
      const std::vector<double> eigenvalues(12, eigenvalue_of(factor));
      return plan_bits(config, layers(12), 12, eigenvalues)[0].drops.back().second;
    };
    EXPECT_TRUE(period == 0 || last(period) <= steps);
    EXPECT_GT(last(period + 1), steps);
  }
}

}  // namespace
}  // namespace bitfall
