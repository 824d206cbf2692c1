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

void reference_step(const AdamStep& step, double weight_decay, const std::vector<double>& gradient,
                    std::int64_t begin, std::int64_t end, State& state) {
  for (std::int64_t i = begin; i < end; ++i) {
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
const std::vector<DecayRange> kRanges{{0, 13, 0.0f}, {16, 20000, 0.1f}, {20016, 19991, 0.01f}};

class Adam : public BackendTest {
 protected:
  void expect_matches(AdamStep (*options)(int)) {
    const Tensor master = random(Shape{kNumel}, DType::f32);
    const Tensor exp_avg = zeros(master.shape, DType::f32);
    const Tensor exp_avg_sq = zeros(master.shape, DType::f32);
    State state{values(master), values(exp_avg), values(exp_avg_sq)};
    for (int t = 1; t <= 5; ++t) {
      const Tensor gradient = random(master.shape, DType::f32);
      backend().adam_update(options(t), kRanges, decision(*this), gradient, master, exp_avg,
                            exp_avg_sq);
      for (const DecayRange& range : kRanges) {
        reference_step(options(t), range.weight_decay, values(gradient), range.begin,
                       range.begin + range.numel, state);
      }
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
  const std::vector<DecayRange> ranges{{10, 20, 0.1f}};
  backend().adam_update(adam_step(1), ranges, decision(*this), gradient, master, exp_avg,
                        exp_avg_sq);
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
  backend().adam_update(adam_step(1), kRanges, decision(*this, Skip::yes), gradient, master,
                        exp_avg, exp_avg_sq);
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
      bench.backend().adam_update(adam_step(t), kRanges, decision(bench),
                                  bench.random(master.shape, DType::f32), master, exp_avg,
                                  exp_avg_sq);
    }
    omp_set_num_threads(before);
    return values(master);
  };
  EXPECT_EQ(run(GetParam(), 3), run({CpuIsa::generic, DType::f32}, 1));
}

TEST_P(Adam, RefusesWhatDoesNotFit) {
  const Tensor flat = zeros(Shape{8}, DType::f32), half = zeros(Shape{8}, DType::bf16);
  const auto update = [&](DecayRange range, const Tensor& gradient) {
    const std::vector<DecayRange> ranges{range};
    backend().adam_update(adam_step(1), ranges, decision(*this), gradient, flat, flat, flat);
  };
  EXPECT_THROW(update({0, 9, 0}, flat), ShapeError);
  EXPECT_THROW(update({-1, 3, 0}, flat), ShapeError);
  EXPECT_THROW(update({4, INT64_MAX, 0}, flat), ShapeError);
  EXPECT_THROW(update({0, 8, 0}, zeros(Shape{7}, DType::f32)), ShapeError);
  EXPECT_THROW(update({0, 8, 0}, half), UnsupportedError);
  EXPECT_THROW(backend().adam_update(adam_step(1), {}, flat, flat, flat, flat, flat), ShapeError);
}

INSTANTIATE_TEST_SUITE_P(All, Adam, testing::ValuesIn(backend_cases({DType::f32})), case_name);

}  // namespace
}  // namespace bitfall::test
