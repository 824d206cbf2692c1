// Backend::adam_update against the formulas of DeepSpeed's FusedAdam in f64, and its bits on every
// instruction set.
#include <omp.h>

#include <cmath>
#include <cstring>
#include <limits>

#include "tests/support/backend_fixture.h"

namespace bitfall::test {
namespace {

/// What unscales and clips the gradient in these tests.
constexpr float kMultiplier = 0.125f;

/// The optimizer's state over one flat buffer.
struct State {
  std::vector<double> master, exp_avg, exp_avg_sq;
};

void reference_step(const AdamRange& range, const std::vector<double>& gradient, State& state) {
  const AdamStep& step = range.step;
  const double weight_decay = step.weight_decay;
  for (std::int64_t i = range.begin; i < range.begin + range.numel; ++i) {
    double& weight = state.master[i];
    double g = gradient[i] * kMultiplier;
    if (!step.adam_w_mode) g += weight_decay * weight;
    double& m = state.exp_avg[i];
    double& v = state.exp_avg_sq[i];
    m = step.beta1 * m + (1.0 - step.beta1) * g;
    v = step.beta2 * v + (1.0 - step.beta2) * g * g;
    double change =
        m / step.bias_correction1 / (std::sqrt(v / step.bias_correction2) + step.epsilon);
    if (step.adam_w_mode) change += weight_decay * weight;
    weight -= step.learning_rate * change;
  }
}

AdamStep adam_step(int t) {
  AdamStep step;
  step.learning_rate = 1e-3f;
  step.bias_correction1 = static_cast<float>(1 - std::pow(0.9, t));
  step.bias_correction2 = static_cast<float>(1 - std::pow(0.999, t));
  return step;
}

enum class Skip { no, yes };

Tensor decision(BackendWorkbench& bench, Skip skip = Skip::no) {
  const Tensor memory = bench.zeros(Shape{sizeof(UpdateDecision)}, DType::s8);
  const UpdateDecision decided{.gradient_multiplier = kMultiplier,
                               .skip = skip == Skip::yes ? 1 : 0};
  std::memcpy(memory.data, &decided, sizeof(decided));
  return memory;
}

/// numel elements in three ranges: odd sizes, a gap between them, one longer than a chunk.
constexpr std::int64_t kNumel = 40007;
std::vector<AdamRange> ranges_of(const AdamStep& step) {
  std::vector<AdamRange> ranges{{0, 13, step}, {16, 20000, step}, {20016, 19991, step}};
  ranges[1].step.weight_decay = 0.1f;
  ranges[2].step.weight_decay = 0.01f;
  return ranges;
}

class Adam : public BackendTest {
 protected:
  void expect_matches(AdamStep (*options)(int)) {
    const Tensor master = random(Shape{kNumel}, DType::f32);
    const Tensor exp_avg = zeros(master.shape, DType::f32);
    const Tensor exp_avg_sq = zeros(master.shape, DType::f32);
    State state{values(master), values(exp_avg), values(exp_avg_sq)};
    for (int t = 1; t <= 5; ++t) {
      const Tensor gradient = random(master.shape, DType::f32);
      backend().adam_update(ranges_of(options(t)),
                            {decision(*this), gradient, master, exp_avg, exp_avg_sq}, {}, {});
      for (const AdamRange& range : ranges_of(options(t)))
        reference_step(range, values(gradient), state);
    }
    EXPECT_TRUE(close(values(master), state.master, {1e-6, 1e-6}));
    EXPECT_TRUE(close(values(exp_avg), state.exp_avg, {1e-7, 1e-5}));
    EXPECT_TRUE(close(values(exp_avg_sq), state.exp_avg_sq, {1e-9, 1e-5}));
  }
};

TEST_P(Adam, DecoupledDecay) { expect_matches(adam_step); }

TEST_P(Adam, DecayInTheGradient) {
  expect_matches([](int t) {
    AdamStep step = adam_step(t);
    step.adam_w_mode = false;
    return step;
  });
}

TEST_P(Adam, WithoutBiasCorrection) {
  expect_matches([](int t) {
    AdamStep step = adam_step(t);
    step.bias_correction1 = step.bias_correction2 = 1;
    return step;
  });
}

TEST_P(Adam, LeavesOtherElementsAlone) {
  const Tensor master = random(Shape{64}, DType::f32), gradient = random(Shape{64}, DType::f32);
  const Tensor exp_avg = zeros(Shape{64}, DType::f32), exp_avg_sq = zeros(Shape{64}, DType::f32);
  const std::vector<double> before = values(master);
  const std::vector<AdamRange> ranges{{10, 20, adam_step(1)}};
  backend().adam_update(ranges, {decision(*this), gradient, master, exp_avg, exp_avg_sq}, {}, {});
  for (std::size_t i = 0; i < 64; ++i)
    EXPECT_EQ(values(master)[i] != before[i], i >= 10 && i < 30) << "element " << i;
}

TEST_P(Adam, LeavesEverythingAloneIfTheStepIsSkipped) {
  const Tensor master = random(Shape{kNumel}, DType::f32);
  const Tensor exp_avg = random(master.shape, DType::f32);
  const Tensor exp_avg_sq = random(master.shape, DType::f32);
  const Tensor gradient = random(master.shape, DType::f32);
  gradient.as<float>()[20] = std::numeric_limits<float>::infinity();
  const auto state = [&] {
    return std::vector{values(master), values(exp_avg), values(exp_avg_sq)};
  };
  const auto before = state();
  backend().adam_update(ranges_of(adam_step(1)),
                        {decision(*this, Skip::yes), gradient, master, exp_avg, exp_avg_sq}, {},
                        {});
  EXPECT_EQ(state(), before);
}

TEST_P(Adam, HasTheSameBitsEverywhere) {
  const auto run = [](const BackendCase& which, int threads) {
    BackendWorkbench bench(which);
    const Tensor master = bench.random(Shape{kNumel}, DType::f32);
    const Tensor exp_avg = bench.zeros(master.shape, DType::f32);
    const Tensor exp_avg_sq = bench.zeros(master.shape, DType::f32);
    const int before = omp_get_max_threads();
    omp_set_num_threads(threads);
    for (int t = 1; t <= 3; ++t) {
      const Tensor gradient = bench.random(master.shape, DType::f32);
      bench.backend().adam_update(ranges_of(adam_step(t)),
                                  {decision(bench), gradient, master, exp_avg, exp_avg_sq}, {}, {});
    }
    omp_set_num_threads(before);
    return values(master);
  };
  EXPECT_EQ(run(GetParam(), 3), run({CpuIsa::generic, DType::f32}, 1));
}

TEST_P(Adam, RefusesWhatDoesNotFit) {
  const Tensor flat = zeros(Shape{8}, DType::f32), half = zeros(Shape{8}, DType::bf16);
  const auto update = [&](AdamRange range, const Tensor& gradient,
                          const std::vector<FakeQuantizeRange>& published = {}) {
    range.step = adam_step(1);
    backend().adam_update({&range, 1}, {decision(*this), gradient, flat, flat, flat}, published,
                          half);
  };
  EXPECT_THROW(update({0, 9}, flat), ShapeError);
  EXPECT_THROW(update({-1, 3}, flat), ShapeError);
  EXPECT_THROW(update({4, INT64_MAX}, flat), ShapeError);
  EXPECT_THROW(update({0, 8}, zeros(Shape{7}, DType::f32)), ShapeError);
  EXPECT_THROW(update({0, 8}, half), UnsupportedError);
  EXPECT_THROW(update({0, 8}, flat, {{0, 4}}), ShapeError);
  EXPECT_THROW(update({0, 8}, flat, {{0, 4}, {4, 4}}), ShapeError);
  EXPECT_THROW(update({0, 8}, flat, {{0, 8, {8, 3}}}), ShapeError);
  EXPECT_THROW(backend().adam_update({}, {flat, flat, flat, flat, flat}, {}, {}), ShapeError);
}

INSTANTIATE_TEST_SUITE_P(All, Adam, testing::ValuesIn(backend_cases({DType::f32})), case_name);

/// What is updated and published, and the tensors that this changes.
struct Published {
  std::vector<AdamRange> updated;
  std::vector<FakeQuantizeRange> published;
  Tensor gradient, master, exp_avg, exp_avg_sq, working;

  AdamTensors tensors(const Tensor& decision) const {
    return {decision, gradient, master, exp_avg, exp_avg_sq};
  }
  auto state() const {
    return std::vector{values(master), values(exp_avg), values(exp_avg_sq), values(working)};
  }
};

/// Ranges of all widths with steps of their own. Blocks of a GPU hold 8192 elements; on the
/// emulated one, groups of more than four such tiles are read and written by different blocks.
Published all_widths(BackendWorkbench& bench, DType dtype) {
  constexpr Rounding kNearest = Rounding::nearest, kStochastic = Rounding::stochastic;
  constexpr QuantType kSymmetric = QuantType::symmetric, kAsymmetric = QuantType::asymmetric;
  Published all;
  std::int64_t numel = 1;
  const auto add = [&](std::int64_t size, QuantSpec spec, float mix, std::int64_t gap) {
    const auto index = static_cast<std::uint32_t>(all.updated.size());
    AdamStep step = adam_step(1 + static_cast<int>(index));
    step.weight_decay = 0.1f * static_cast<float>(index % 2);
    step.adam_w_mode = index % 3 != 0;
    all.updated.push_back({numel, size, step});
    all.published.push_back({numel, size, spec, {5, 6, index, 33}, mix});
    numel += size + gap;
  };
  add(1000, {16}, 0, 7);
  add(3 * 9001, {8, 3, kAsymmetric, kNearest}, 0.25f, 0);
  add(2 * 41'000, {6, 2, kSymmetric, kStochastic}, 0, 3);
  add(2 * 33'333, {8, 2}, 0, 5);
  add(40'000, {8, 1}, 0, 0);
  add(768, {4, 8, kAsymmetric, kStochastic}, 0.5f, 0);
  add(17'000, {2, 1}, 0, 1);
  add(30'000, {32}, 0, 0);
  add(600, {1, 3}, 0.5f, 4);
  all.gradient = bench.random(Shape{numel}, DType::f32);
  all.master = bench.random(Shape{numel}, DType::f32, 0.1);
  all.exp_avg = bench.zeros(Shape{numel}, DType::f32);
  all.exp_avg_sq = bench.zeros(Shape{numel}, DType::f32);
  all.working = bench.zeros(Shape{numel}, dtype);
  return all;
}

class AdamPublished : public BackendTest {};

// Bit for bit as the update and fake_quantize one after the other on the CPU.
TEST_P(AdamPublished, WorkingWeightsAreThoseOfTheNewMasters) {
  const Published here = all_widths(*this, dtype());
  BackendWorkbench bench(CpuIsa::generic);
  const Published there = all_widths(bench, dtype());
  for (const Skip skip : {Skip::no, Skip::no, Skip::yes}) {
    const std::vector<double> masters = values(here.master);
    backend().adam_update(here.updated, here.tensors(decision(*this, skip)), here.published,
                          here.working);
    bench.backend().adam_update(there.updated, there.tensors(decision(bench, skip)), {}, {});
    bench.backend().fake_quantize(there.published, there.master, there.working);
    ASSERT_TRUE(here.state() == there.state());
    EXPECT_EQ(values(here.master) == masters, skip == Skip::yes);
    std::memset(here.working.data, 0, here.working.bytes());
  }
}

BITFALL_BACKEND_SUITE(AdamPublished);

}  // namespace
}  // namespace bitfall::test
