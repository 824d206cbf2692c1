#include "core/parameter_store.h"

#include <gtest/gtest.h>

#include <string>

#include "csrc_cpu/cpu_backend.h"

namespace bitfall {
namespace {

using WorkingCopy = ParameterStore::WorkingCopy;

std::vector<ParameterSpec> specs() {
  return {{"embedding", Shape{3, 5}, kNoBlock},
          {"layer.0.query", Shape{2, 3}, 0},
          {"layer.0.key", Shape{2, 3}, 0, Placement::adjacent},
          {"layer.1.query", Shape{2, 3}, 1},
          {"head", Shape{2}, kNoBlock}};
}

class ParameterStoreTest : public testing::Test {
 protected:
  CpuBackend backend_{CpuIsa::generic};

  std::string error_of(const std::vector<ParameterSpec>& list) {
    try {
      ParameterStore(backend_, list, DType::f32, WorkingCopy::shared);
    } catch (const ConfigError& error) {
      return error.what();
    }
    return "no error";
  }
};

TEST_F(ParameterStoreTest, LaysOutInOrderAlignedOrAdjacent) {
  const ParameterStore store(backend_, specs(), DType::bf16, WorkingCopy::separate);
  std::vector<std::int64_t> offsets;
  for (const Parameter& parameter : store.parameters()) offsets.push_back(parameter.offset);
  EXPECT_EQ(offsets, (std::vector<std::int64_t>{0, 16, 22, 32, 48}));
  EXPECT_EQ(store.numel(), 64);
  EXPECT_EQ(store.num_blocks(), 2);
  EXPECT_EQ(store.block_range(0).begin, 16);
  EXPECT_EQ(store.block_range(0).numel, 12);
  EXPECT_EQ(store.block_range(1).begin, 32);
  EXPECT_THROW(store.block_range(2), ShapeError);
  EXPECT_THROW(store.block_range(-1), ShapeError);
}

TEST_F(ParameterStoreTest, ViewsPointIntoTheFlatBuffers) {
  const ParameterStore store(backend_, specs(), DType::bf16, WorkingCopy::separate);
  const std::size_t key = store.index_of("layer.0.key");
  EXPECT_EQ(store.master(key).as<float>(), store.master().as<float>() + 22);
  EXPECT_EQ(store.gradient(key).shape, Shape({2, 3}));
  EXPECT_EQ(store.working(key).dtype, DType::bf16);
  EXPECT_EQ(store.working(key).as<BFloat16>(), store.working().as<BFloat16>() + 22);
  const std::vector<Tensor> views = store.views(store.gradient());
  ASSERT_EQ(views.size(), 5u);
  EXPECT_EQ(views[4].as<float>(), store.gradient().as<float>() + 48);
  EXPECT_THROW(store.views(store.master(key)), ShapeError);
  EXPECT_THROW(store.index_of("layer.0.value"), ConfigError);
}

TEST_F(ParameterStoreTest, SharesTheWorkingCopyOnlyInF32) {
  EXPECT_TRUE(
      ParameterStore(backend_, specs(), DType::f32, WorkingCopy::shared).working_is_master());
  EXPECT_FALSE(
      ParameterStore(backend_, specs(), DType::f32, WorkingCopy::separate).working_is_master());
  EXPECT_FALSE(
      ParameterStore(backend_, specs(), DType::f16, WorkingCopy::shared).working_is_master());
}

TEST_F(ParameterStoreTest, KeepsASliceOfMastersAndGradients) {
  for (const WorkingCopy copy : {WorkingCopy::separate, WorkingCopy::shared}) {
    ParameterStore store(backend_, specs(), DType::f32, copy);
    float* const whole = store.master().as<float>();
    for (int i = 0; i < 64; ++i) whole[i] = static_cast<float>(i);
    const Partition partition(64, 3, {});  // 0..21, 21..42, 42..64
    store.keep_slice(backend_, partition, 1, ParameterStore::Slices::masters_and_gradients);
    EXPECT_EQ(store.owned(), (FlatRange{21, 21}));
    EXPECT_EQ(store.master().numel(), 21);
    EXPECT_EQ(store.gradient().numel(), 21);
    EXPECT_EQ(store.working().numel(), 64);
    EXPECT_EQ(store.master().as<float>()[0], 21.0f);
    EXPECT_EQ(store.master({30, 4}).as<float>()[0], 30.0f);
    EXPECT_EQ(store.master(store.index_of("layer.1.query")).as<float>()[0], 32.0f);
    EXPECT_EQ(store.gradient({30, 4}).as<float>(), store.gradient().as<float>() + 9);
    EXPECT_THROW(store.master(store.index_of("embedding")), ShapeError);
    EXPECT_THROW(store.master({40, 4}), ShapeError);
    EXPECT_EQ(store.working_is_master(), copy == WorkingCopy::shared);
    if (copy == WorkingCopy::shared) {
      EXPECT_EQ(store.master().as<float>(), store.working().as<float>() + 21);
    }
  }
}

TEST_F(ParameterStoreTest, GradientsMayStayWhole) {
  ParameterStore store(backend_, specs(), DType::bf16, WorkingCopy::separate);
  store.keep_slice(backend_, Partition(64, 2, {}), 1, ParameterStore::Slices::masters);
  EXPECT_EQ(store.master().numel(), 32);
  EXPECT_EQ(store.gradient().numel(), 64);
  EXPECT_EQ(store.gradient(store.index_of("embedding")).as<float>(), store.gradient().as<float>());
}

TEST_F(ParameterStoreTest, RefusesRepeatedNamesAndScatteredBlocks) {
  std::vector<ParameterSpec> list = specs();
  list[4].name = "embedding";
  EXPECT_NE(error_of(list).find("'embedding' occurs twice"), std::string::npos);
  list = specs();
  list[4].block = 0;
  EXPECT_NE(error_of(list).find("blocks must be consecutive"), std::string::npos);
  list = specs();
  list[1].block = list[2].block = 5;
  EXPECT_NE(error_of(list).find("blocks must be consecutive"), std::string::npos);
}

}  // namespace
}  // namespace bitfall
