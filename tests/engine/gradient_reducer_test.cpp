#include "engine/gradient_reducer.h"

#include <gtest/gtest.h>

#include <cmath>
#include <functional>

#include "core/error.h"
#include "csrc_cpu/cpu_backend.h"

namespace bitfall {
namespace {

/// Rank 0 of two, the other of which sends zeros. Reductions happen as late as they may, and what
/// is undefined becomes NaN.
class LateCommunicator final : public Communicator {
 public:
  int rank() const override { return 0; }
  int world_size() const override { return 2; }
  int local_rank() const override { return 0; }
  void all_reduce(const Tensor&, ReduceOp) override { FAIL(); }
  void all_reduce_async(const Tensor& values, ReduceOp op) override { reduce_async(values, op, 0); }
  void reduce_async(const Tensor& values, ReduceOp, int root) override {
    pending_.emplace_back([values, root] {
      for (std::int64_t i = 0; i < values.numel(); ++i) {
        values.as<float>()[i] *= root == 0 ? 0.5f : NAN;
      }
    });
  }
  void wait_all() override {
    for (const auto& reduce : pending_) reduce();
    pending_.clear();
  }
  void broadcast(const Tensor&, int) override { FAIL(); }
  void broadcast(std::vector<std::byte>&, int) override { FAIL(); }
  std::vector<std::vector<std::byte>> all_gather(const std::vector<std::byte>& bytes) override {
    return {bytes, bytes};
  }
  void barrier() override {}
  void abort(const std::string&) override {}

 private:
  std::vector<std::function<void()>> pending_;
};

/// Blocks of different layouts, so that gaps of one lie where another has gradients.
const std::vector<ParameterSpec> kSpecs = {
    {"embedding", Shape{3, 5}},
    {"layer.0.weight", Shape{2, 3}, 0},
    {"layer.0.bias", Shape{20}, 0},
    {"layer.1.weight", Shape{40}, 1},
    {"layer.2.weight", Shape{17, 2}, 2},
    {"layer.2.bias", Shape{1}, 2},
    {"head", Shape{2}},
};

class GradientReducerTest : public testing::Test {
 protected:
  CpuBackend backend{CpuIsa::generic};
  LateCommunicator communicator;
  ParameterStore store{backend, kSpecs, DType::bf16, ParameterStore::WorkingCopy::separate};
  float loss_value = 0.75f;
  const Tensor loss{&loss_value, DType::f32, Shape{1}, Device::cpu};

  void keep_slice() {
    store.keep_slice(backend, Partition(store.numel(), 2, {}), 0,
                     ParameterStore::Slices::masters_and_gradients);
  }

  UpdateDecision decide(const GradientReducer& reducer) {
    UpdateDecision decided;
    const Shape shape{sizeof(decided)};
    reducer.decide_update(loss, {.loss_scale = 16}, {&decided, DType::s8, shape, Device::cpu});
    return decided;
  }

  static float gradient(std::size_t parameter, std::int64_t element, int pass) {
    return static_cast<float>(100 * parameter + 7 * pass + 1) + static_cast<float>(element);
  }

  /// A backward pass that overwrites gradients, or adds to them.
  void backward(GradientReducer& reducer, int pass, Accumulate accumulate) {
    const std::vector<Tensor> views = reducer.views();
    const bool each = reducer.reduces_every_micro_batch();
    for (int block = store.num_blocks() - 1; block >= kNoBlock; --block) {
      for (std::size_t index = 0; index < views.size(); ++index) {
        if (kSpecs[index].block != block) continue;
        for (std::int64_t i = 0; i < views[index].numel(); ++i) {
          float& value = views[index].as<float>()[i];
          value = (each || accumulate == Accumulate::no ? 0 : value) + gradient(index, i, pass);
        }
      }
      if (each || pass == 1) reducer.start(block, accumulate);
    }
  }

  /// Means of two passes over the elements that this rank keeps; zeros in the gaps.
  void expect_means(FlatRange kept) {
    std::vector<float> expected(static_cast<std::size_t>(store.numel()));
    for (std::size_t index = 0; index < kSpecs.size(); ++index) {
      const Parameter& parameter = store.parameters()[index];
      for (std::int64_t i = 0; i < parameter.numel; ++i) {
        expected[static_cast<std::size_t>(parameter.offset + i)] =
            0.5f * (gradient(index, i, 0) + gradient(index, i, 1));
      }
    }
    const Tensor seen = store.gradient(kept);
    for (std::int64_t i = 0; i < kept.numel; ++i) {
      ASSERT_EQ(seen.as<float>()[i], expected[static_cast<std::size_t>(kept.begin + i)]) << i;
    }
  }
};

TEST_F(GradientReducerTest, WholeGradientsBecomeMeans) {
  GradientReducer reducer(backend, communicator, store);
  EXPECT_FALSE(reducer.reduces_every_micro_batch());
  EXPECT_EQ(reducer.bucket_bytes(), 0u);
  backward(reducer, 0, Accumulate::no);
  backward(reducer, 1, Accumulate::yes);
  reducer.finish();
  expect_means({0, store.numel()});
}

TEST_F(GradientReducerTest, SlicesGetTheMeansOfEveryPass) {
  keep_slice();
  GradientReducer reducer(backend, communicator, store);
  EXPECT_TRUE(reducer.reduces_every_micro_batch());
  // Two buckets of 64 (the longest block has 49), more than the 16 before the blocks; then 12 and 8
  // between blocks and 31 at the end, aligned as in the flat buffers.
  EXPECT_EQ(reducer.bucket_bytes(), 4u * (2 * 64 + 16 + 16 + 32));
  const std::vector<Tensor> views = reducer.views();
  for (std::size_t index = 0; index < views.size(); ++index) {
    const auto address = reinterpret_cast<std::uintptr_t>(views[index].data);
    EXPECT_EQ(address % 64, 4 * store.parameters()[index].offset % 64) << kSpecs[index].name;
  }
  for (int step = 0; step < 2; ++step) {
    backward(reducer, 0, Accumulate::no);
    backward(reducer, 1, Accumulate::yes);
    reducer.finish();
    expect_means(store.owned());
    const UpdateDecision decided = decide(reducer);
    EXPECT_EQ(decided.grad_norm, std::sqrt(2 * backend.squared_sum(store.gradient())) / 16);
    EXPECT_EQ(decided.loss, 0.75f);
    EXPECT_EQ(decided.skip, 0);
  }
}

TEST_F(GradientReducerTest, NormsOfParametersFindTheBrokenOne) {
  keep_slice();
  GradientReducer reducer(backend, communicator, store);
  store.gradient(FlatRange{store.parameters()[1].offset, 1}).as<float>()[0] = NAN;
  const std::vector<double> norms = reducer.squared_norms();
  ASSERT_EQ(norms.size(), kSpecs.size());
  EXPECT_EQ(norms[0], 0);
  EXPECT_TRUE(std::isnan(norms[1]));
  EXPECT_EQ(decide(reducer).skip, 1);
}

TEST_F(GradientReducerTest, RefusesAnotherOrderOfBlocks) {
  keep_slice();
  GradientReducer reducer(backend, communicator, store);
  EXPECT_THROW(reducer.start(0, Accumulate::no), ShapeError);
  EXPECT_THROW(reducer.start(kNoBlock, Accumulate::no), ShapeError);
  reducer.start(2, Accumulate::no);
  EXPECT_THROW(reducer.start(0, Accumulate::no), ShapeError);
  reducer.start(2, Accumulate::no);  // a new pass after one that failed
  reducer.start(1, Accumulate::no);
}

}  // namespace
}  // namespace bitfall
