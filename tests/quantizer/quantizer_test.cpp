// Which parameters are quantized, at which state's width, and what publish writes.
#include "quantizer/quantizer.h"

#include <gmock/gmock.h>

#include <set>

#include "quantizer/quant_math.h"
#include "tests/support/backend_fixture.h"

namespace bitfall {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;

const std::vector<ParameterSpec> kSpecs{
    {"bert.embeddings.word.weight", Shape{30, 16}},
    {"bert.embeddings.LayerNorm.weight", Shape{16}},
    {"encoder.layer.0.query.weight", Shape{16, 16}, 0},
    {"encoder.layer.0.query.bias", Shape{16}, 0},
    {"encoder.layer.1.query.weight", Shape{16, 16}, 1},
    {"encoder.layer.1.output.weight", Shape{64, 16}, 1},
    {"classifier.weight", Shape{2, 16}},
};

QuantizeGroupConfig group_named(const std::string& name, std::vector<std::string> modules,
                                std::vector<std::string> exclude_modules = {}) {
  return {.name = name,
          .start_bits = 8,
          .target_bits = 4,
          .quantize_period = 2,
          .modules = std::move(modules),
          .exclude_modules = std::move(exclude_modules)};
}

QuantizeConfig config_with(std::vector<QuantizeGroupConfig> groups) {
  QuantizeConfig config;
  config.enabled = true;
  config.groups = std::move(groups);
  config.schedule_offset = 1;
  config.quantize_groups = 4;
  return config;
}

class QuantizerTest : public testing::Test {
 protected:
  QuantizerTest() {
    std::mt19937 random(1);
    for (std::size_t index = 0; index < kSpecs.size(); ++index) {
      for (std::int64_t i = 0; i < store_.master(index).numel(); ++i) {
        store_.master(index).as<float>()[i] =
            static_cast<float>(static_cast<std::int32_t>(random())) * 1e-10f;
      }
    }
  }

  std::vector<std::string> state_names(const QuantizeConfig& config) {
    std::vector<std::string> names;
    for (const BitStateSpec& state : bit_states(config, store_.parameters(), "encoder.layer"))
      names.push_back(state.name);
    return names;
  }

  BitSchedule schedule(const QuantizeConfig& config) {
    return {config, bit_states(config, store_.parameters(), "encoder.layer"), 2};
  }

  std::string error_of(const QuantizeConfig& config) {
    try {
      const BitSchedule states = schedule(config);
      Quantizer(config, store_, states, 1);
    } catch (const ConfigError& error) {
      return error.what();
    }
    return "no error";
  }

  std::vector<double> working(std::size_t index) { return test::values(store_.working(index)); }

  std::vector<double> expected(std::size_t index, const QuantSpec& spec, float mix = 0.0f) {
    test::BackendWorkbench bench(choose_isa());
    const Tensor result = bench.zeros(store_.master(index).shape, DType::bf16);
    test::fake_quantize(backend_, spec, {}, mix, store_.master(index), result);
    return test::values(result);
  }

  CpuBackend backend_;
  ParameterStore store_{backend_, kSpecs, DType::bf16, ParameterStore::WorkingCopy::separate};
};

TEST_F(QuantizerTest, StatesAreBlocksAndOther) {
  const std::vector<BitStateSpec> states =
      bit_states(config_with({group_named("", {})}), store_.parameters(), "bert.encoder.layer");
  ASSERT_EQ(states.size(), 3u);
  EXPECT_EQ(states[0].name, "bert.encoder.layer.0");
  EXPECT_EQ(states[1].name, "bert.encoder.layer.1");
  EXPECT_EQ(states[1].block, 1);
  EXPECT_EQ(states[2].name, "other");
  EXPECT_EQ(states[2].block, kNoBlock);
}

TEST_F(QuantizerTest, StatesWithoutParametersAreLeftOut) {
  EXPECT_THAT(state_names(config_with({group_named("", {"layer\\.1"})})),
              ElementsAre("encoder.layer.1"));
  EXPECT_THAT(state_names(config_with({group_named("", {}, {"layer"})})), ElementsAre("other"));
  EXPECT_THAT(state_names(config_with(
                  {group_named("attention", {"query"}), group_named("rest", {}, {"query"})})),
              ElementsAre("attention/encoder.layer.0", "attention/encoder.layer.1",
                          "rest/encoder.layer.1", "rest/other"));
}

TEST_F(QuantizerTest, PatternsSeeParameterAndModuleNames) {
  EXPECT_THAT(state_names(config_with({group_named("", {"^classifier$"})})), ElementsAre("other"));
  EXPECT_THAT(state_names(config_with({group_named("", {"0.query.weight$"})})),
              ElementsAre("encoder.layer.0"));
  EXPECT_THAT(state_names(config_with({group_named("", {"query"}, {"LayerNorm"})})),
              ElementsAre("encoder.layer.0", "encoder.layer.1"));
}

TEST_F(QuantizerTest, RefusesPatternsThatDoNothing) {
  EXPECT_THAT(error_of(config_with({group_named("", {"query", "qwery"})})),
              HasSubstr("modules pattern 'qwery' matches no parameter"));
  EXPECT_THAT(error_of(config_with({group_named("", {"LayerNorm"})})),
              HasSubstr("matches no parameter with two or more dimensions"));
  EXPECT_THAT(error_of(config_with({group_named("wq1", {}, {"pooler"})})),
              HasSubstr("quantize group 'wq1': exclude_modules pattern 'pooler' matches no"));
  EXPECT_THAT(error_of(config_with({group_named("", {"*"})})),
              HasSubstr("'*' is no regular expression"));
  EXPECT_THAT(error_of(config_with({group_named("", {"query"}, {"layer"})})),
              HasSubstr("selects no parameter"));
}

TEST_F(QuantizerTest, RefusesOverlappingGroups) {
  EXPECT_THAT(error_of(config_with({group_named("a", {"query"}), group_named("b", {"layer"})})),
              HasSubstr("'encoder.layer.0.query.weight' belongs to two quantize groups, 'a' and"));
}

TEST_F(QuantizerTest, NamesTheTensorThatDoesNotDivide) {
  QuantizeConfig config = config_with({group_named("", {})});
  config.quantize_groups = 12;
  const std::string error = error_of(config);
  EXPECT_THAT(error, HasSubstr("'encoder.layer.0.query.weight' of 256 elements [16, 16]"));
  EXPECT_THAT(error, HasSubstr("nearest divisors are 8 and 16"));
  EXPECT_THAT(error, HasSubstr("quantize_groups = 8 suits all"));
  config.quantize_groups = 1000;
  EXPECT_THAT(error_of(config), HasSubstr("nearest divisors are 480 and 480"));
  config.quantize_groups = 0;
  EXPECT_THAT(error_of(config), HasSubstr("quantize_groups = 0"));
}

TEST_F(QuantizerTest, RefusesWhatTernaryWeightsCannotDo) {
  QuantizeConfig config = config_with({group_named("", {})});
  config.groups[0].target_bits = 2;
  EXPECT_EQ(error_of(config), "no error");
  config.rounding = Rounding::stochastic;
  EXPECT_THAT(error_of(config), HasSubstr("ternary"));
}

TEST_F(QuantizerTest, RefusesToOverwriteMasters) {
  ParameterStore shared(backend_, kSpecs, DType::f32, ParameterStore::WorkingCopy::shared);
  const QuantizeConfig config = config_with({group_named("", {})});
  const BitSchedule states = schedule(config);
  EXPECT_THROW(Quantizer(config, shared, states, 1), ConfigError);
}

TEST_F(QuantizerTest, PublishesEachParameterAtItsStatesWidth) {
  const QuantizeConfig config = config_with({group_named("", {})});
  BitSchedule states = schedule(config);
  Quantizer quantizer(config, store_, states, 1);
  const QuantSpec cast{16, 4};

  states.advance(1, {});  // the offset
  quantizer.publish(backend_, store_, 1);
  for (std::size_t index = 0; index < kSpecs.size(); ++index)
    EXPECT_EQ(working(index), expected(index, cast)) << kSpecs[index].name;

  states.advance(2, std::vector<double>{0.0, 1.0});
  quantizer.publish(backend_, store_, 2);
  EXPECT_EQ(working(2), expected(2, {8, 4}));

  for (int step = 3; step <= 6; ++step) states.advance(step, {});
  EXPECT_EQ(states.bits(0), 6);  // thresholds 2, 4
  EXPECT_EQ(states.bits(1), 7);  // thresholds 2, 20
  quantizer.publish(backend_, store_, 6);
  EXPECT_EQ(working(0), expected(0, {6, 4}));
  EXPECT_EQ(working(1), expected(1, cast));  // one dimension
  EXPECT_EQ(working(2), expected(2, {6, 4}));
  EXPECT_EQ(working(3), expected(3, cast));
  EXPECT_EQ(working(4), expected(4, {7, 4}));
  EXPECT_EQ(working(5), expected(5, {7, 4}));
  EXPECT_EQ(working(6), expected(6, {6, 4}));
  EXPECT_EQ(quantizer.spec(4).bits, 7);
  EXPECT_EQ(quantizer.spec(1).bits, 16);
  EXPECT_FALSE(quantizer.selects(1));
}

TEST_F(QuantizerTest, NeverTouchesTheMasters) {
  QuantizeConfig config = config_with({group_named("", {})});
  BitSchedule states = schedule(config);
  Quantizer quantizer(config, store_, states, 1);
  const std::vector<double> before = test::values(store_.master());
  for (int step = 1; step <= 4; ++step) {
    states.advance(step, {});
    quantizer.publish(backend_, store_, step);
  }
  EXPECT_EQ(test::values(store_.master()), before);
}

TEST_F(QuantizerTest, MixReachesTheWorkingWeightsButNotTheExport) {
  QuantizeConfig config = config_with({group_named("", {"layer"})});
  config.mixed_enabled = true;
  config.change_ratio = 0.25;
  BitSchedule states = schedule(config);
  Quantizer quantizer(config, store_, states, 1);
  for (int step = 1; step <= 2; ++step) states.advance(step, {});
  quantizer.publish(backend_, store_, 2);
  EXPECT_EQ(working(2), expected(2, {8, 4}, 0.5f));

  test::BackendWorkbench bench(choose_isa());
  const Tensor flat = bench.zeros(Shape{store_.numel()}, DType::f32);
  quantizer.quantize_into(backend_, store_, 2, flat);
  const std::vector<Tensor> views = store_.views(flat);
  const std::vector<double> exported = test::values(views[2]);
  for (std::size_t group = 0; group < 4; ++group) {
    const auto first = exported.begin() + static_cast<std::ptrdiff_t>(group * 64);
    EXPECT_LE(std::set<double>(first, first + 64).size(), 256u);
  }
  const Tensor grid = bench.zeros(views[2].shape, DType::f32);
  test::fake_quantize(backend_, {8, 4}, {}, 0.0f, store_.master(2), grid);
  EXPECT_EQ(exported, test::values(grid));
  EXPECT_EQ(test::values(views[0]), test::values(store_.master(0)));
  EXPECT_THROW(quantizer.quantize_into(backend_, store_, 2, store_.working()), UnsupportedError);
}

// Slices between scales: what ranks publish and export together is what one process does.
TEST_F(QuantizerTest, SlicesTogetherGiveTheWhole) {
  for (const Rounding rounding : {Rounding::nearest, Rounding::stochastic}) {
    QuantizeConfig config = config_with({group_named("", {}, {"classifier"})});
    config.rounding = rounding;
    BitSchedule states = schedule(config);
    Quantizer whole(config, store_, states, 1);
    for (int step = 1; step <= 2; ++step) states.advance(step, {});
    whole.publish(backend_, store_, 2);
    test::BackendWorkbench bench(choose_isa());
    const Tensor exported = bench.zeros(Shape{store_.numel()}, DType::f32);
    whole.quantize_into(backend_, store_, 2, exported);

    const std::vector<std::int64_t> units = elements_per_scale(config, store_.parameters());
    EXPECT_THAT(units, ElementsAre(120, 1, 64, 1, 64, 256, 1));
    std::vector<DivisibleRange> parts;
    for (std::size_t i = 0; i < units.size(); ++i) {
      parts.push_back({store_.parameters()[i].range(), units[i]});
    }
    const Partition partition(store_.numel(), 4, parts);
    for (int rank = 0; rank < 4; ++rank) {
      ParameterStore sliced(backend_, kSpecs, DType::bf16, ParameterStore::WorkingCopy::separate);
      backend_.copy(store_.master(), sliced.master());
      sliced.keep_slice(backend_, partition, rank, ParameterStore::Slices::masters);
      const FlatRange mine = sliced.owned();
      Quantizer quantizer(config, sliced, states, 1);
      quantizer.publish(backend_, sliced, 2);
      EXPECT_EQ(test::values(sliced.working(mine)), test::values(store_.working(mine)));
      const Tensor part = bench.zeros(Shape{store_.numel()}, DType::f32);
      quantizer.quantize_into(backend_, sliced, 2, part);
      EXPECT_EQ(test::values(part.flat_slice(mine.begin, mine.numel)),
                test::values(exported.flat_slice(mine.begin, mine.numel)));
    }
  }
}

TEST_F(QuantizerTest, StochasticWeightsAreThoseOfTheStep) {
  QuantizeConfig config = config_with({group_named("", {})});
  config.rounding = Rounding::stochastic;
  BitSchedule states = schedule(config);
  Quantizer quantizer(config, store_, states, 1), other_seed(config, store_, states, 2);
  for (int step = 1; step <= 2; ++step) states.advance(step, {});
  quantizer.publish(backend_, store_, 2);
  const std::vector<double> first = working(2), other_parameter = working(4);
  EXPECT_NE(first, other_parameter);
  quantizer.publish(backend_, store_, 3);
  EXPECT_NE(working(2), first);
  other_seed.publish(backend_, store_, 2);
  EXPECT_NE(working(2), first);
  quantizer.publish(backend_, store_, 2);
  EXPECT_EQ(working(2), first);
}

}  // namespace
}  // namespace bitfall
