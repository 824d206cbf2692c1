#include "engine/eigenvalue_boundary.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>

#include "engine/model_hessian.h"
#include "tests/engine/golden_case.h"

namespace bitfall {
namespace {

// Keys of the start vectors in make_eigenvalue_goldens.py.
constexpr std::uint64_t kSeed = 42;
constexpr std::int64_t kStep = 1;
constexpr const char* kTinyCase = "tiny_classification_gelu";

/// Two ranks, of which the other has no sample: sums are ours, means half of ours.
class HalvingCommunicator final : public Communicator {
 public:
  int rank() const override { return 0; }
  int world_size() const override { return 2; }
  int local_rank() const override { return 0; }
  void all_reduce(const Tensor& values, ReduceOp op) override {
    if (op == ReduceOp::sum) return;
    ++means;
    for (std::int64_t i = 0; i < values.numel(); ++i) values.as<float>()[i] *= 0.5f;
  }
  void all_reduce_async(const Tensor&, ReduceOp) override { FAIL(); }
  void reduce_async(const Tensor&, ReduceOp, int) override { FAIL(); }
  void wait_all() override {}
  void broadcast(const Tensor&, int) override { FAIL(); }
  void broadcast(std::vector<std::byte>&, int) override {}
  std::vector<std::vector<std::byte>> all_gather(const std::vector<std::byte>& bytes) override {
    return {bytes, bytes};
  }
  void barrier() override {}
  void abort(const std::string&) override {}

  int means = 0;
};

class EigenvalueBoundaryTest : public testing::Test {
 protected:
  static EigenvalueConfig config_with_tol(double tol) {
    EigenvalueConfig config;
    config.enabled = true;
    config.tol = tol;
    config.max_iter = 1000;
    return config;
  }

  static std::vector<EigenvalueResult> compute(GoldenCase& tiny, const EigenvalueConfig& config,
                                               std::span<const Batch> micro_batches,
                                               std::int64_t step = kStep) {
    SingleProcess alone;
    return compute(tiny, config, micro_batches, step, alone);
  }

  static std::vector<EigenvalueResult> compute(GoldenCase& tiny, const EigenvalueConfig& config,
                                               std::span<const Batch> micro_batches,
                                               std::int64_t step, Communicator& communicator) {
    ModelHessian hessian(tiny.backend, communicator, tiny.model, tiny.store,
                         tiny.store.views(tiny.store.gradient()), micro_batches);
    EigenvalueBoundary boundary(config, kSeed, tiny.backend, communicator, tiny.store);
    return boundary.compute(hessian, step);
  }

  static std::vector<EigenvalueResult> compute(GoldenCase& tiny, double tol) {
    return compute(tiny, config_with_tol(tol), {&tiny.batch, 1});
  }

  const SafetensorsFile exact_{goldens_folder() / "eigenvalues.safetensors"};
};

/// Sequences [begin, end) of `batch`.
Batch sequences(const Batch& batch, std::size_t begin, std::size_t end) {
  const auto first = batch.sequence_starts[begin], last = batch.sequence_starts[end];
  Batch part;
  part.input_ids.assign(batch.input_ids.begin() + first, batch.input_ids.begin() + last);
  part.token_type_ids.assign(batch.token_type_ids.begin() + first,
                             batch.token_type_ids.begin() + last);
  for (std::size_t i = begin; i <= end; ++i) {
    part.sequence_starts.push_back(batch.sequence_starts[i] - first);
  }
  for (std::size_t i = begin; i < end; ++i) {
    part.sample_keys.push_back(batch.sample_keys[i]);
    part.class_labels.push_back(batch.class_labels[i]);
  }
  return part;
}

TEST_F(EigenvalueBoundaryTest, MatchesTheDenseHessian) {
  GoldenCase tiny(kTinyCase, DType::f32);
  const std::vector<float> dense = read_floats(exact_, "tiny.dense");
  const std::vector<EigenvalueResult> results = compute(tiny, 1e-6);
  ASSERT_EQ(results.size(), dense.size());
  for (std::size_t i = 0; i < dense.size(); ++i) {
    EXPECT_NEAR(results[i].value, dense[i], 1e-4 * dense[i]) << results[i].name;
    EXPECT_TRUE(results[i].converged);
    EXPECT_LT(results[i].products, results[i].iterations);
  }
}

TEST_F(EigenvalueBoundaryTest, MatchesPowerIterationByDoubleDifferentiation) {
  GoldenCase tiny(kTinyCase, DType::f32);
  const std::vector<float> values = read_floats(exact_, "tiny.power_iteration");
  const std::vector<std::int32_t> iterations = read_integers(exact_, "tiny.iterations");
  const std::vector<EigenvalueResult> results = compute(tiny, 1e-2);
  double largest = 0;
  for (const float value : values) largest = std::max(largest, std::fabs(double{value}));
  for (std::size_t i = 0; i < values.size(); ++i) {
    const double value = std::fabs(double{values[i]});
    EXPECT_EQ(results[i].name, concat("bert.encoder.layer.", i));
    EXPECT_EQ(results[i].block, static_cast<int>(i));
    EXPECT_NEAR(results[i].value, value, 1e-3 * value);
    EXPECT_EQ(results[i].iterations, iterations[i]);
    EXPECT_NEAR(results[i].normalized, value / largest, 0.02);
    EXPECT_EQ(results[i].factor, 1 + static_cast<int>(4 * results[i].normalized));
  }
}

TEST_F(EigenvalueBoundaryTest, LeavesTheTrainingUntouched) {
  for (const DType dtype : {DType::f32, DType::bf16}) {
    GoldenCase tiny(kTinyCase, dtype);
    const ForwardContext context{Mode::train, 5, 9};
    const std::vector<float> gradients = tiny.gradients(context);
    std::vector<std::byte> working(tiny.store.working().bytes());
    std::memcpy(working.data(), tiny.store.working().data, working.size());

    compute(tiny, 1e-2);

    EXPECT_EQ(to_floats(tiny.store.gradient()), gradients);
    EXPECT_EQ(std::memcmp(working.data(), tiny.store.working().data, working.size()), 0);
    EXPECT_EQ(tiny.gradients(context), gradients);  // bound to the store again
  }
}

TEST_F(EigenvalueBoundaryTest, BindsTheStoreAgainAfterAnError) {
  GoldenCase tiny(kTinyCase, DType::bf16);
  const ForwardContext context{Mode::train, 5, 9};
  const std::vector<float> gradients = tiny.gradients(context);
  Batch bad = tiny.batch;
  bad.class_labels[0] = 77;
  EXPECT_THROW(compute(tiny, config_with_tol(1e-2), {&bad, 1}), ShapeError);
  EXPECT_EQ(tiny.gradients(context), gradients);
}

TEST_F(EigenvalueBoundaryTest, IsDeterministicAndKeyedByStep) {
  GoldenCase tiny(kTinyCase, DType::f32);
  const double first = compute(tiny, 1e-2)[0].value;
  EXPECT_EQ(compute(tiny, 1e-2)[0].value, first);
  EXPECT_NE(compute(tiny, config_with_tol(1e-2), {&tiny.batch, 1}, kStep + 1)[0].value, first);
}

TEST_F(EigenvalueBoundaryTest, SeveralMicroBatchesGiveTheirMean) {
  GoldenCase tiny(kTinyCase, DType::f32);
  const std::vector<EigenvalueResult> whole = compute(tiny, 1e-4);
  // Unequal parts: samples count, not micro-batches.
  const std::vector<Batch> parts{sequences(tiny.batch, 0, 1), sequences(tiny.batch, 1, 4)};
  const std::vector<EigenvalueResult> mean = compute(tiny, config_with_tol(1e-4), parts);
  for (std::size_t i = 0; i < whole.size(); ++i) {
    EXPECT_NEAR(mean[i].value, whole[i].value, 5e-3 * whole[i].value);
  }
}

TEST_F(EigenvalueBoundaryTest, ReadsWorkingWeightsInF32) {
  GoldenCase bf16(kTinyCase, DType::bf16);
  GoldenCase f32(kTinyCase, DType::f32);
  bf16.backend.cast(bf16.store.working(), f32.store.working());
  const std::vector<EigenvalueResult> a = compute(bf16, 1e-2), b = compute(f32, 1e-2);
  for (std::size_t i = 0; i < a.size(); ++i) EXPECT_EQ(a[i].value, b[i].value);
}

TEST_F(EigenvalueBoundaryTest, ReducesEachProductOverTheRanks) {
  GoldenCase tiny(kTinyCase, DType::f32);
  const std::vector<EigenvalueResult> alone = compute(tiny, 1e-4);
  HalvingCommunicator halving;
  const std::vector<EigenvalueResult> half =
      compute(tiny, config_with_tol(1e-4), {&tiny.batch, 1}, kStep, halving);
  int products = 0;
  for (std::size_t i = 0; i < half.size(); ++i) {
    EXPECT_NEAR(half[i].value, alone[i].value, 2e-3 * alone[i].value);
    products += half[i].products;
  }
  EXPECT_EQ(halving.means, products);
}

TEST_F(EigenvalueBoundaryTest, HonoursLayerNumAndMaxIter) {
  GoldenCase tiny(kTinyCase, DType::f32);
  EigenvalueConfig config = config_with_tol(1e-9);
  config.layer_num = 1;
  config.max_iter = 3;
  const std::vector<EigenvalueResult> results = compute(tiny, config, {&tiny.batch, 1});
  ASSERT_EQ(results.size(), 1u);
  EXPECT_EQ(results[0].iterations, 3);
  EXPECT_FALSE(results[0].converged);
  EXPECT_THROW(compute(tiny, config, {}), ShapeError);
}

TEST(EigenvaluesDue, OnlyWhenOnAtTheResolutionAndBeforeADrop) {
  QuantizeConfig quantize;
  quantize.enabled = true;
  quantize.schedule_offset = 0;
  quantize.groups = {{"", 10, 8, 1, {}, {}}};
  BitSchedule schedule(quantize, {{"block", 0, 0}, {"other", kNoBlock, 0}}, 1);
  while (!schedule.block_would_drop()) schedule.advance(1, {});

  EigenvalueConfig config;
  EXPECT_FALSE(eigenvalues_due(config, schedule, 1));
  config.enabled = true;
  EXPECT_TRUE(eigenvalues_due(config, schedule, 1));
  config.gas_boundary_resolution = 2;
  EXPECT_FALSE(eigenvalues_due(config, schedule, 1));
  EXPECT_TRUE(eigenvalues_due(config, schedule, 2));
  for (std::int64_t step = 1; step < 50; ++step) schedule.advance(step, {});
  EXPECT_FALSE(eigenvalues_due(config, schedule, 2));  // at its target
}

}  // namespace
}  // namespace bitfall
