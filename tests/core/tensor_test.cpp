#include "core/tensor.h"

#include <gtest/gtest.h>

#include <string>
#include <vector>

namespace bitfall {
namespace {

Tensor over(std::vector<float>& data, const Shape& shape) {
  return {data.data(), DType::f32, shape};
}

TEST(Shape, CountsElementsAndPrints) {
  EXPECT_EQ(Shape().numel(), 1);
  EXPECT_EQ(Shape({2, 3, 4}).numel(), 24);
  EXPECT_EQ(Shape({2, 0}).numel(), 0);
  EXPECT_EQ(Shape({2, 3}).to_string(), "[2, 3]");
  EXPECT_EQ(Shape().to_string(), "[]");
  EXPECT_NE(Shape({2, 3}), Shape({2, 3, 1}));
  EXPECT_THROW(Shape({1, 1, 1, 1, 1, 1, 1, 1, 1}), ShapeError);
}

TEST(Tensor, EmptyHasNoElements) {
  const Tensor empty;
  EXPECT_FALSE(empty);
  EXPECT_EQ(empty.numel(), 0);
  EXPECT_EQ(empty.bytes(), 0u);
}

TEST(Tensor, ViewsShareMemory) {
  std::vector<float> data(12);
  const Tensor tensor = over(data, Shape{4, 3});
  EXPECT_EQ(tensor.bytes(), 48u);
  EXPECT_EQ(tensor.rows(2, 2).as<float>(), data.data() + 6);
  EXPECT_EQ(tensor.rows(2, 2).shape, Shape({2, 3}));
  EXPECT_EQ(tensor.rows(4, 0).numel(), 0);
  EXPECT_EQ(tensor.flat_slice(5, 7).as<float>(), data.data() + 5);
  EXPECT_EQ(tensor.reshaped(Shape{2, 6}).as<float>(), data.data());
}

TEST(Tensor, ViewsOutsideThrow) {
  std::vector<float> data(12);
  const Tensor tensor = over(data, Shape{4, 3});
  EXPECT_THROW(tensor.rows(3, 2), ShapeError);
  EXPECT_THROW(tensor.rows(-1, 2), ShapeError);
  EXPECT_THROW(tensor.rows(1, -1), ShapeError);
  EXPECT_THROW(tensor.flat_slice(6, 7), ShapeError);
  EXPECT_THROW(tensor.flat_slice(-1, 1), ShapeError);
  EXPECT_THROW(tensor.reshaped(Shape{5, 3}), ShapeError);
  EXPECT_THROW(over(data, Shape()).rows(0, 1), ShapeError);
}

TEST(Tensor, CheckShapeNamesTensorAndBothShapes) {
  std::vector<float> data(6);
  check_shape("weight", over(data, Shape{2, 3}), Shape{2, 3});
  try {
    check_shape("weight", over(data, Shape{2, 3}), Shape{3, 2});
    FAIL() << "no error";
  } catch (const ShapeError& error) {
    EXPECT_STREQ(error.what(), "weight has shape [2, 3], expected [3, 2]");
  }
}

TEST(Buffer, ViewsKeepWithinTheMemory) {
  std::vector<float> data(8);
  const Buffer buffer(std::shared_ptr<void>(data.data(), [](void*) {}), 32, Device::cpu);
  EXPECT_EQ(buffer.view(DType::f32, Shape{4}, 16).as<float>(), data.data() + 4);
  EXPECT_EQ(buffer.view(DType::f16, Shape{16}).numel(), 16);
  EXPECT_THROW(buffer.view(DType::f32, Shape{9}), ShapeError);
  EXPECT_THROW(buffer.view(DType::f32, Shape{4}, 17), ShapeError);
}

}  // namespace
}  // namespace bitfall
