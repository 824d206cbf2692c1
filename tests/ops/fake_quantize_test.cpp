// Backend::fake_quantize against a plain transcription of spec A5, on every instruction set.
#include <omp.h>

#include <bit>
#include <cmath>
#include <limits>
#include <random>

#include "quantizer/quant_math.h"
#include "tests/support/backend_fixture.h"

namespace bitfall::test {
namespace {

constexpr QuantType kSymmetric = QuantType::symmetric;
constexpr QuantType kAsymmetric = QuantType::asymmetric;

std::vector<float> floats_of(const Tensor& tensor) {
  return {tensor.as<float>(), tensor.as<float>() + tensor.numel()};
}

/// The formulas of spec A5 for 2 < bits < 16, one group of several distinct elements.
std::vector<float> transcribed_group(std::span<const float> group, int bits, QuantType q_type,
                                     std::span<const float> offsets) {
  const float min = *std::min_element(group.begin(), group.end());
  const float max = *std::max_element(group.begin(), group.end());
  const auto levels = static_cast<float>(1 << bits);
  const float largest = std::max(std::fabs(min), std::fabs(max));
  const float scale = q_type == kSymmetric ? 2 * largest / levels : (max - min) / levels;
  const float zero_point = q_type == kSymmetric ? 0.0f : std::nearbyint(min / scale);
  const float lowest = q_type == kSymmetric ? -levels / 2 : 0.0f;
  const float highest = q_type == kSymmetric ? levels / 2 - 1 : levels - 1;
  std::vector<float> values;
  for (std::size_t i = 0; i < group.size(); ++i) {
    const float code = std::nearbyint(group[i] / scale + offsets[i]) - zero_point;
    values.push_back((std::min(std::max(code, lowest), highest) + zero_point) * scale);
  }
  return values;
}

std::vector<float> transcribed(const Tensor& master, const QuantSpec& spec,
                               const StochasticKey& key) {
  const std::vector<float> all = floats_of(master);
  const std::size_t size = all.size() / static_cast<std::size_t>(spec.groups);
  std::vector<float> values, offsets(all.size(), 0.0f);
  for (std::size_t i = 0; spec.rounding == Rounding::stochastic && i < all.size(); ++i)
    offsets[i] = stochastic_offset(key, static_cast<std::int64_t>(i));
  for (std::size_t begin = 0; begin < all.size(); begin += size) {
    const auto part = transcribed_group(std::span(all).subspan(begin, size), spec.bits, spec.q_type,
                                        std::span(offsets).subspan(begin, size));
    values.insert(values.end(), part.begin(), part.end());
  }
  return values;
}

class FakeQuantize : public BackendTest {
 protected:
  /// Quantizes into a fresh tensor and compares it with `expected` rounded to the dtype.
  void expect_quantized(const Tensor& master, const QuantSpec& spec,
                        const std::vector<float>& expected, float mix = 0.0f,
                        const StochasticKey& key = {}) {
    const Tensor working = zeros(master.shape, dtype());
    fake_quantize(backend(), spec, key, mix, master, working);
    visit_dtype(dtype(), [&](auto tag) {
      using T = typename decltype(tag)::type;
      for (std::size_t i = 0; i < expected.size(); ++i) {
        const float value = mix * master.as<float>()[i] + (1 - mix) * expected[i];
        ASSERT_EQ(to_float(working.as<T>()[i]), to_float(from_float<T>(value)))
            << "element " << i << ", " << spec.bits << " bits, " << spec.groups << " groups of "
            << expected.size();
      }
    });
  }
};

TEST_P(FakeQuantize, MatchesTheFormulas) {
  struct Size {
    std::int64_t numel, groups;
  };
  for (const Size size : {Size{7, 1}, {111, 3}, {4096, 8}, {40001, 1}, {3 * 20011, 3}}) {
    const Tensor master = random(Shape{size.numel}, DType::f32, 0.04);
    for (const int bits : {3, 4, 8, 12, 15}) {
      for (const QuantType q_type : {kSymmetric, kAsymmetric}) {
        const QuantSpec spec{bits, size.groups, q_type, Rounding::nearest};
        expect_quantized(master, spec, transcribed(master, spec, {}));
      }
    }
  }
}

TEST_P(FakeQuantize, QuotientsAreRoundedBeforeTheyBecomeCodes) {
  // Weights next to the middle between two codes, of groups of all sizes.
  constexpr std::int64_t kGroups = 240, kSize = 64;
  std::mt19937 random(7);
  for (const int bits : {8, 12}) {
    for (const QuantType q_type : {kSymmetric, kAsymmetric}) {
      const Tensor master = zeros(Shape{kGroups * kSize}, DType::f32);
      for (std::int64_t group = 0; group < kGroups; ++group) {
        float* const weights = master.as<float>() + group * kSize;
        const double mantissa = 1 + static_cast<double>(random() % 8388608) / 8388608;
        const double largest = std::ldexp(mantissa, static_cast<int>(group) - 113);
        weights[0] = static_cast<float>(largest);
        weights[1] = q_type == kSymmetric ? -weights[0] / 2 : 0.0f;
        const double scale = std::ldexp(weights[0], q_type == kSymmetric ? 1 - bits : -bits);
        for (std::int64_t i = 2; i < kSize; ++i) {
          const double code = random() % (1u << (bits - 1)) + 0.5;
          const auto middle = static_cast<float>(code * scale);
          const int steps = static_cast<int>(random() % 5) - 2;
          weights[i] = std::bit_cast<float>(std::bit_cast<std::int32_t>(middle) + steps);
        }
      }
      const QuantSpec spec{bits, kGroups, q_type, Rounding::nearest};
      expect_quantized(master, spec, transcribed(master, spec, {}));
    }
  }
}

TEST_P(FakeQuantize, StochasticRoundingUsesTheElementsOwnNumbers) {
  const StochasticKey key{99, 5, 17};
  for (const std::int64_t groups : {1, 3, 101}) {
    const Tensor master = random(Shape{101 * 303}, DType::f32, 0.04);
    for (const QuantType q_type : {kSymmetric, kAsymmetric}) {
      const QuantSpec spec{8, groups, q_type, Rounding::stochastic};
      expect_quantized(master, spec, transcribed(master, spec, key), 0.0f, key);
    }
  }
}

// Ranks that share a parameter quantize some of its groups each.
TEST_P(FakeQuantize, GroupsOfAPartAreThoseOfTheWhole) {
  const std::int64_t numel = 6 * 777;
  const Tensor master = random(Shape{numel}, DType::f32, 0.04);
  const StochasticKey key{99, 5, 17};
  for (const int bits : {2, 8}) {
    const Rounding rounding = bits == 2 ? Rounding::nearest : Rounding::stochastic;
    const Tensor whole = zeros(master.shape, dtype());
    fake_quantize(backend(), {bits, 6, kSymmetric, rounding}, key, 0.0f, master, whole);
    const Tensor part = zeros(Shape{3 * 777}, dtype());
    StochasticKey of_part = key;
    of_part.first_element = 2 * 777;
    fake_quantize(backend(), {bits, 3, kSymmetric, rounding}, of_part, 0.0f,
                  master.flat_slice(2 * 777, 3 * 777), part);
    EXPECT_EQ(values(part), values(whole.flat_slice(2 * 777, 3 * 777))) << bits << " bits";
  }
}

/// Ranges of many sizes and ways, with gaps between them.
std::vector<FakeQuantizeRange> many_ranges(std::int64_t numel) {
  const std::vector<QuantSpec> specs{{8, 4},
                                     {16, 1},
                                     {2, 2},
                                     {4, 3, kAsymmetric, Rounding::stochastic},
                                     {1, 1},
                                     {32, 2},
                                     {8, 6, kSymmetric, Rounding::stochastic}};
  std::vector<FakeQuantizeRange> ranges;
  std::int64_t begin = 3, size = 1;
  for (std::uint32_t index = 0; begin + 12 * size <= numel; ++index) {
    const StochasticKey key{7, 8, index, index % 3 == 0 ? 45 : 0};
    ranges.push_back({begin, 12 * size, specs[index % specs.size()], key, 0.1f * (index % 2)});
    begin += 12 * size + index % 4;
    // Ternary number 9 and binary number 11 have groups of several chunks.
    size = index == 8 || index == 10 ? 2900 : 1 + index % 23;
  }
  return ranges;
}

/// `ranges` of `master` into `working` one by one, on the CPU.
void quantize_one_by_one(std::span<const FakeQuantizeRange> ranges, const Tensor& master,
                         const Tensor& working) {
  CpuBackend cpu(CpuIsa::generic);
  for (const FakeQuantizeRange& range : ranges)
    fake_quantize(cpu, range.spec, range.key, range.mix,
                  master.flat_slice(range.begin, range.numel),
                  working.flat_slice(range.begin, range.numel));
}

// All at once, and on every device, as the CPU does range by range.
TEST_P(FakeQuantize, RangesAreQuantizedEachInItsWay) {
  const std::int64_t numel = 76'000;
  const Tensor master = random(Shape{numel}, DType::f32, 0.04);
  const std::vector<double> masters = values(master);
  const std::vector<FakeQuantizeRange> ranges = many_ranges(numel);
  ASSERT_GT(ranges.size(), 30u);
  const Tensor working = zeros(master.shape, dtype()), expected = zeros(master.shape, dtype());
  quantize_one_by_one(ranges, master, expected);
  // The same ranges again, and others after them.
  for (const std::size_t count : {ranges.size(), ranges.size(), std::size_t{5}}) {
    std::memset(working.data, 0, working.bytes());
    backend().fake_quantize(std::span(ranges).first(count), master, working);
    const std::int64_t end = ranges[count - 1].begin + ranges[count - 1].numel;
    EXPECT_EQ(values(working.flat_slice(0, end)), values(expected.flat_slice(0, end)));
    for (const double rest : values(working.flat_slice(end, numel - end))) ASSERT_EQ(rest, 0.0);
  }
  EXPECT_EQ(values(master), masters);
}

// A block of a GPU holds 8192 elements; the emulated GPU lets four blocks wait for each other.
TEST_P(FakeQuantize, GroupsOfManyTilesAreOneGroup) {
  constexpr Rounding kNearest = Rounding::nearest, kStochastic = Rounding::stochastic;
  const std::int64_t tile = 8192;
  std::vector<FakeQuantizeRange> ranges{
      {0, 8 * tile, {8, 2}},
      {0, 2 * tile, {2, 1}},
      {0, 4 * tile + 1, {5, 1, kAsymmetric, kNearest}, {}, 0.3f},
      {0, 3 * (4 * tile + 8), {8, 3}},
      {0, tile + 1, {16, 1}},
      {0, 2 * 33'001, {4, 2, kAsymmetric, kStochastic}, {7, 8, 9}},
      {0, 3 * 19'999, {6, 3, kSymmetric, kStochastic}, {7, 8, 5, 77}},
      {0, tile + 77, {1, 1}},
      {0, 12 * tile, {8, 1, kSymmetric, kStochastic}}};
  std::int64_t numel = 0;
  for (FakeQuantizeRange& range : ranges) {
    range.begin = numel;
    numel += range.numel + 3;
  }
  const Tensor master = random(Shape{numel}, DType::f32, 0.04);
  const Tensor working = zeros(master.shape, dtype()), expected = zeros(master.shape, dtype());
  quantize_one_by_one(ranges, master, expected);
  backend().fake_quantize(ranges, master, working);
  EXPECT_TRUE(values(working) == values(expected));
  if (dtype() != DType::f32) return;
  std::memcpy(expected.data, master.data, master.bytes());  // what lies between ranges stays
  quantize_one_by_one(ranges, master, expected);
  backend().fake_quantize(ranges, master, master);
  EXPECT_TRUE(values(master) == values(expected)) << "in place";
}

TEST_P(FakeQuantize, MixBlendsMasterAndQuantizedWeight) {
  const Tensor master = random(Shape{12, 100}, DType::f32, 0.5);
  const QuantSpec spec{4, 4, kSymmetric, Rounding::nearest};
  for (const float mix : {1.0f, 0.75f, 0.001f})
    expect_quantized(master, spec, transcribed(master, spec, {}), mix);
}

TEST_P(FakeQuantize, TernaryAndBinaryFollowMeanMagnitudes) {
  const std::int64_t numel = 2 * 20000;
  const Tensor master = random(Shape{numel}, DType::f32, 0.3);
  for (const int bits : {1, 2}) {
    const Tensor working = zeros(master.shape, DType::f32);
    fake_quantize(backend(), {bits, 2}, {}, 0.0f, master, working);
    for (std::int64_t begin = 0; begin < numel; begin += numel / 2) {
      const std::span<const float> group(master.as<float>() + begin, numel / 2);
      double sum = 0, above = 0, count = 0;
      for (const float value : group) sum += std::fabs(value);
      const double threshold = bits == 1 ? 0 : 0.7 * sum / static_cast<double>(group.size());
      for (const float value : group) {
        above += std::fabs(value) > threshold ? std::fabs(value) : 0;
        count += std::fabs(value) > threshold;
      }
      for (std::size_t i = 0; i < group.size(); ++i) {
        const double sign = group[i] < 0 ? -1 : 1;
        const double expected = std::fabs(group[i]) > threshold ? sign * above / count : 0;
        ASSERT_NEAR(working.as<float>()[begin + static_cast<std::int64_t>(i)], expected, 1e-7);
      }
    }
  }
}

TEST_P(FakeQuantize, SixteenBitsAndMoreAreACast) {
  const Tensor master = random(Shape{1000}, DType::f32);
  const StochasticKey key{1, 2, 3};
  for (const int bits : {16, 32}) {
    expect_quantized(master, {bits, 8, kAsymmetric, Rounding::stochastic}, floats_of(master), 0.0f,
                     key);
  }
}

TEST_P(FakeQuantize, FaultsStayVisibleInTheirGroup) {
  const float infinity = std::numeric_limits<float>::infinity();
  for (const float bad : {infinity, -infinity, std::nanf("")}) {
    for (const int bits : {1, 2, 4, 8}) {
      const Tensor master = random(Shape{300}, DType::f32);
      master.as<float>()[150] = bad;
      const Tensor working = zeros(master.shape, dtype());
      fake_quantize(backend(), {bits, 3}, {}, 0.5f, master, working);
      const std::vector<double> result = values(working);
      for (std::size_t i = 0; i < result.size(); ++i)
        EXPECT_EQ(std::isnan(result[i]), i >= 100 && i < 200) << "element " << i;
    }
  }
}

TEST_P(FakeQuantize, RefusesWhatDoesNotFit) {
  const Tensor master = random(Shape{10}, DType::f32);
  const Tensor working = zeros(Shape{10}, dtype());
  const auto run = [&](const QuantSpec& spec, const Tensor& target) {
    fake_quantize(backend(), spec, {}, 0.0f, master, target);
  };
  EXPECT_THROW(run({8, 3}, working), ShapeError);
  EXPECT_THROW(run({8, 0}, working), ConfigError);
  EXPECT_THROW(run({0, 1}, working), ConfigError);
  EXPECT_THROW(run({-1, 1}, working), ConfigError);
  EXPECT_THROW(run({2, 1, kAsymmetric, Rounding::nearest}, working), ConfigError);
  EXPECT_THROW(run({1, 1, kSymmetric, Rounding::stochastic}, working), ConfigError);
  EXPECT_THROW(run({8, 1}, zeros(Shape{9}, dtype())), ShapeError);
  EXPECT_THROW(run({8, 1}, zeros(Shape{10}, DType::s32)), UnsupportedError);
  for (const auto& [begin, numel] : {std::pair{-1, 5}, {6, 5}, {0, -1}}) {
    const FakeQuantizeRange outside{begin, numel, {8, 1}};
    EXPECT_THROW(backend().fake_quantize({&outside, 1}, master, working), ShapeError);
  }
}

BITFALL_BACKEND_SUITE(FakeQuantize);

class FakeQuantizeHugeGroups : public FakeQuantize {};

// More than half of a large GPU holds. Not emulated, since it takes long.
TEST_P(FakeQuantizeHugeGroups, AreQuantizedAsOnTheCpu) {
  const std::int64_t numel = 3 * 5'000'000;
  const Tensor master = random(Shape{numel}, DType::f32, 0.04);
  const Tensor working = zeros(master.shape, dtype()), expected = zeros(master.shape, dtype());
  const FakeQuantizeRange all{0, numel, {8, 3, kAsymmetric, Rounding::nearest}};
  quantize_one_by_one({&all, 1}, master, expected);
  backend().fake_quantize({&all, 1}, master, working);
  EXPECT_EQ(std::memcmp(working.data, expected.data, working.bytes()), 0);
}

INSTANTIATE_TEST_SUITE_P(All, FakeQuantizeHugeGroups,
                         testing::Values(BackendCase{CpuIsa::generic, DType::bf16, Device::cuda}),
                         case_name);

/// Every byte of the result, on one thread count and instruction set.
std::vector<std::uint16_t> half_bits(CpuIsa isa, int threads, const QuantSpec& spec,
                                     std::int64_t step, DType dtype) {
  BackendWorkbench bench(isa);
  const Tensor master = bench.random(Shape{6 * 16411}, DType::f32, 0.02);
  const Tensor working = bench.zeros(master.shape, dtype);
  const int before = omp_get_max_threads();
  omp_set_num_threads(threads);
  fake_quantize(bench.backend(), spec, {42, static_cast<std::uint64_t>(step), 9}, 0.25f, master,
                working);
  omp_set_num_threads(before);
  return {working.as<std::uint16_t>(), working.as<std::uint16_t>() + working.bytes() / 2};
}

TEST(FakeQuantizeDeterminism, SameBitsOnAllInstructionSetsAndThreadCounts) {
  const std::vector<QuantSpec> specs{{1, 2},
                                     {2, 1},
                                     {8, 1},
                                     {5, 6, kAsymmetric, Rounding::nearest},
                                     {8, 1, kSymmetric, Rounding::stochastic},
                                     {4, 6, kAsymmetric, Rounding::stochastic}};
  for (const QuantSpec& spec : specs) {
    for (const DType dtype : {DType::f32, DType::bf16, DType::f16}) {
      const auto expected = half_bits(CpuIsa::generic, 1, spec, 1, dtype);
      for (const CpuIsa isa : supported_isas()) {
        for (const int threads : {1, 2, 3})
          EXPECT_EQ(half_bits(isa, threads, spec, 1, dtype), expected)
              << name(isa) << ", " << threads << " threads, " << spec.bits << " bits";
      }
    }
  }
}

TEST(FakeQuantizeDeterminism, EachStepRoundsDifferently) {
  const QuantSpec spec{8, 1, kSymmetric, Rounding::stochastic};
  const auto first = half_bits(choose_isa(), 1, spec, 1, DType::f32);
  EXPECT_NE(first, half_bits(choose_isa(), 1, spec, 2, DType::f32));
  EXPECT_EQ(first, half_bits(choose_isa(), 1, spec, 1, DType::f32));
}

TEST(FakeQuantizeStochastic, IsUnbiased) {
  BackendWorkbench bench(choose_isa());
  const std::int64_t numel = 1000;
  const Tensor master = bench.random(Shape{numel}, DType::f32);
  master.as<float>()[0] = 8.0f;  // sets the scale; all others stay inside the clamp
  const Tensor working = bench.zeros(master.shape, DType::f32);
  constexpr int kSteps = 400;
  const double scale = 8.0 / 8;  // 4 bits
  std::vector<double> sums(numel);
  for (std::uint64_t step = 0; step < kSteps; ++step) {
    fake_quantize(bench.backend(), {4, 1, kSymmetric, Rounding::stochastic}, {1, step, 0}, 0.0f,
                  master, working);
    for (std::int64_t i = 0; i < numel; ++i) sums[i] += working.as<float>()[i];
  }
  double total_error = 0;
  for (std::int64_t i = 1; i < numel; ++i) {
    const double error = sums[i] / kSteps - master.as<float>()[i];
    // One rounding has a standard deviation of at most half a step.
    EXPECT_NEAR(error, 0.0, 5 * 0.5 * scale / std::sqrt(kSteps)) << "element " << i;
    total_error += error;
  }
  EXPECT_NEAR(total_error / numel, 0.0, 5 * 0.5 * scale / std::sqrt(double{kSteps} * numel));
}

TEST(FakeQuantizeInPlace, MayOverwriteAnF32Master) {
  BackendWorkbench bench(choose_isa());
  const Tensor master = bench.random(Shape{50000}, DType::f32);
  const Tensor working = bench.zeros(master.shape, DType::f32);
  fake_quantize(bench.backend(), {6, 5}, {}, 0.0f, master, working);
  fake_quantize(bench.backend(), {6, 5}, {}, 0.0f, master, master);
  EXPECT_EQ(floats_of(master), floats_of(working));
}

}  // namespace
}  // namespace bitfall::test
