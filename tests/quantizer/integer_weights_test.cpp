// Integer codes: the same values as fake quantization bit for bit, and lossless packing.
#include "quantizer/integer_weights.h"

#include <gmock/gmock.h>

#include <bit>
#include <limits>
#include <set>

#include "tests/support/backend_fixture.h"

namespace bitfall {
namespace {

using test::BackendWorkbench;
using testing::ElementsAre;

constexpr QuantType kSymmetric = QuantType::symmetric;
constexpr QuantType kAsymmetric = QuantType::asymmetric;

/// Every combination that is defined below 16 bits.
std::vector<QuantSpec> all_specs(std::int64_t groups) {
  std::vector<QuantSpec> specs{{1, groups}, {2, groups}};
  for (int bits = 3; bits < 16; ++bits) {
    for (const QuantType q_type : {kSymmetric, kAsymmetric}) {
      for (const Rounding rounding : {Rounding::nearest, Rounding::stochastic})
        specs.push_back({bits, groups, q_type, rounding});
    }
  }
  return specs;
}

class IntegerWeightsTest : public testing::Test, public BackendWorkbench {
 protected:
  IntegerWeightsTest() : BackendWorkbench(choose_isa()) {}

  /// Weights with exact zeros, tiny and large ones among them.
  Tensor master(std::int64_t numel) {
    const Tensor tensor = random(Shape{numel}, DType::f32, 0.03);
    for (std::int64_t i = 0; i < numel; i += 97) tensor.as<float>()[i] = 0.0f;
    tensor.as<float>()[1] = 1.5f;
    tensor.as<float>()[2] = -1e-40f;
    return tensor;
  }
};

TEST_F(IntegerWeightsTest, StandForTheWeightsThatTrainingUses) {
  const Tensor weights = master(2 * 16500);
  const Tensor working = zeros(weights.shape, DType::f32);
  const StochasticKey key{11, 12, 13};
  for (const QuantSpec& spec : all_specs(2)) {
    test::fake_quantize(backend(), spec, key, 0.0f, weights, working);
    const std::vector<float> unpacked = dequantize(quantize_to_integers(spec, key, weights));
    ASSERT_EQ(unpacked.size(), 2u * 16500);
    for (std::size_t i = 0; i < unpacked.size(); ++i) {
      ASSERT_EQ(std::bit_cast<std::uint32_t>(unpacked[i]), working.as<std::uint32_t>()[i])
          << "element " << i << ", " << spec.bits << " bits";
    }
  }
}

TEST_F(IntegerWeightsTest, CodesSurvivePacking) {
  for (const std::int64_t numel : {3 * 101, 3 * 64, 3}) {
    const Tensor weights = master(numel);
    for (const QuantSpec& spec : all_specs(3)) {
      const IntegerWeights integers = quantize_to_integers(spec, {}, weights);
      const PackedCodes packed = pack_codes(integers);
      EXPECT_EQ(unpack_codes(packed, spec.q_type), integers.codes) << spec.bits << " bits";
      EXPECT_EQ(packed.numel, numel);
    }
  }
}

TEST_F(IntegerWeightsTest, PackedSizeIsTheBitsOfTheSpec) {
  const Tensor weights = random(Shape{800}, DType::f32);
  for (const QuantSpec& spec : all_specs(4)) {
    const std::int64_t code_bits = spec.bits <= 8 ? spec.bits : 16;
    const PackedCodes packed = pack_codes(quantize_to_integers(spec, {}, weights));
    EXPECT_EQ(packed.code_bits, code_bits);
    EXPECT_EQ(packed_code_bits(spec), code_bits);
    EXPECT_EQ(static_cast<std::int64_t>(packed.bytes.size()), 100 * code_bits);
    EXPECT_EQ(packed_bytes(spec, 800), 100 * code_bits + 4 * (spec.q_type == kSymmetric ? 4 : 8));
  }
}

TEST_F(IntegerWeightsTest, LayoutIsPlainAtEightAndSixteenBits) {
  const Tensor weights = floats(Shape{4}, DType::f32, {1, -1, 0.5, -0.25});
  EXPECT_THAT(pack_codes(quantize_to_integers({8, 1}, {}, weights)).bytes,
              ElementsAre(127, 0x80, 64, 0xe0));  // int8: 127, -128, 64, -32
  EXPECT_THAT(pack_codes(quantize_to_integers({8, 1, kAsymmetric}, {}, weights)).bytes,
              ElementsAre(255, 0, 192, 96));  // uint8
  EXPECT_THAT(pack_codes(quantize_to_integers({9, 1}, {}, weights)).bytes,
              ElementsAre(255, 0, 0, 0xff, 128, 0, 0xc0, 0xff));  // int16: 255, -256, 128, -64
  // Codes 7, -8, 4, -2 of four bits; the first fills the low half of a byte.
  EXPECT_THAT(pack_codes(quantize_to_integers({4, 1}, {}, weights)).bytes, ElementsAre(0x87, 0xe4));
  EXPECT_THAT(pack_codes(quantize_to_integers({1, 1}, {}, weights)).bytes, ElementsAre(0b0101));
}

TEST_F(IntegerWeightsTest, BinaryZerosTakeASecondBit) {
  const Tensor weights = floats(Shape{4}, DType::f32, {1, 0, -1, 1});
  const IntegerWeights integers = quantize_to_integers({1, 1}, {}, weights);
  EXPECT_THAT(integers.codes, ElementsAre(1, 0, -1, 1));
  const PackedCodes packed = pack_codes(integers);
  EXPECT_EQ(packed.code_bits, 2);
  EXPECT_EQ(unpack_codes(packed, kSymmetric), integers.codes);
}

TEST_F(IntegerWeightsTest, CodesFitTheirWidth) {
  const Tensor weights = master(3000);
  for (const QuantSpec& spec : all_specs(3)) {
    const IntegerWeights integers = quantize_to_integers(spec, {}, weights);
    const int span = 1 << spec.bits;
    const int lowest = spec.bits <= 2 ? -1 : spec.q_type == kSymmetric ? -span / 2 : 0;
    const int highest = spec.bits <= 2 ? 1 : lowest + span - 1;
    const std::vector<float> values = dequantize(integers);
    for (std::size_t group = 0; group < 3; ++group) {
      const auto first = integers.codes.begin() + static_cast<std::ptrdiff_t>(group * 1000);
      EXPECT_GE(*std::min_element(first, first + 1000), lowest);
      EXPECT_LE(*std::max_element(first, first + 1000), highest);
      const auto value = values.begin() + static_cast<std::ptrdiff_t>(group * 1000);
      EXPECT_LE(std::set<float>(value, value + 1000).size(),
                static_cast<std::size_t>(spec.bits == 1 ? 3 : span));
    }
  }
}

TEST_F(IntegerWeightsTest, RefusesWhatHasNoCodes) {
  const Tensor weights = random(Shape{12}, DType::f32);
  EXPECT_THROW(quantize_to_integers({16, 1}, {}, weights), ConfigError);
  EXPECT_THROW(quantize_to_integers({8, 5}, {}, weights), ShapeError);
  EXPECT_THROW(quantize_to_integers({2, 1, kAsymmetric}, {}, weights), ConfigError);
  EXPECT_THROW(quantize_to_integers({8, 1}, {}, zeros(Shape{4}, DType::bf16)), UnsupportedError);
  for (const float bad : {std::numeric_limits<float>::infinity(), std::nanf("")}) {
    weights.as<float>()[5] = bad;
    EXPECT_THROW(quantize_to_integers({8, 1}, {}, weights), TrainingError);
  }
}

TEST_F(IntegerWeightsTest, UnpackRefusesSizesThatDoNotFit) {
  PackedCodes packed = pack_codes(quantize_to_integers({5, 1}, {}, random(Shape{9}, DType::f32)));
  ASSERT_EQ(packed.bytes.size(), 6u);
  packed.bytes.pop_back();
  EXPECT_THROW(unpack_codes(packed, kSymmetric), ModelFileError);
  packed.numel = std::numeric_limits<std::int64_t>::max();
  EXPECT_THROW(unpack_codes(packed, kSymmetric), ModelFileError);
  packed.numel = -1;
  EXPECT_THROW(unpack_codes(packed, kSymmetric), ModelFileError);
  packed = {17, 0, {}};
  EXPECT_THROW(unpack_codes(packed, kSymmetric), ModelFileError);
}

TEST_F(IntegerWeightsTest, EmptyTensorsHaveNoCodes) {
  const IntegerWeights integers = quantize_to_integers({8, 1}, {}, zeros(Shape{0}, DType::f32));
  EXPECT_TRUE(integers.codes.empty());
  EXPECT_TRUE(dequantize(integers).empty());
  EXPECT_TRUE(pack_codes(integers).bytes.empty());
}

}  // namespace
}  // namespace bitfall
