// Fixture of tests that run on every instruction set of this CPU in every compute dtype.
#pragma once

#include <gtest/gtest.h>

#include <cstdint>
#include <random>
#include <string>
#include <vector>

#include "csrc_cpu/cpu_backend.h"
#include "tests/support/compare.h"

namespace bitfall::test {

/// A backend and tensors that live as long as the test.
class BackendWorkbench {
 public:
  explicit BackendWorkbench(CpuIsa isa) : backend_(isa) {}

  CpuBackend& backend() { return backend_; }

  Tensor zeros(const Shape& shape, DType dtype) {
    const auto numel = static_cast<std::size_t>(shape.numel());
    // One element at least: an empty tensor is not an absent one.
    buffers_.push_back(backend_.allocate((numel + 1) * size_in_bytes(dtype)));
    return buffers_.back().view(dtype, shape);
  }

  /// `data` rounded to `dtype`.
  Tensor floats(const Shape& shape, DType dtype, const std::vector<double>& data) {
    const Tensor tensor = zeros(shape, dtype);
    visit_dtype(dtype, [&](auto tag) {
      using T = typename decltype(tag)::type;
      for (std::size_t i = 0; i < data.size(); ++i)
        tensor.as<T>()[i] = from_float<T>(static_cast<float>(data[i]));
    });
    return tensor;
  }

  Tensor integers(const Shape& shape, const std::vector<std::int32_t>& data) {
    const Tensor tensor = zeros(shape, DType::s32);
    std::copy(data.begin(), data.end(), tensor.as<std::int32_t>());
    return tensor;
  }

  /// Normally distributed, the same numbers in every test (rounded to `dtype`).
  Tensor random(const Shape& shape, DType dtype, double scale = 1.0) {
    std::normal_distribution<double> distribution(0.0, scale);
    std::vector<double> data(static_cast<std::size_t>(shape.numel()));
    for (double& value : data) value = distribution(generator_);
    return floats(shape, dtype, data);
  }

  /// {sample_key, position} of `rows` rows, all different.
  Tensor row_keys(std::int64_t rows) {
    std::vector<std::int32_t> keys;
    for (std::int32_t row = 0; row < rows; ++row) {
      keys.push_back(1000 + row / 5);
      keys.push_back(row % 5);
    }
    return integers(Shape{rows, 2}, keys);
  }

 private:
  CpuBackend backend_;
  std::vector<Buffer> buffers_;
  std::mt19937 generator_{20210527};
};

struct BackendCase {
  CpuIsa isa;
  DType dtype;
};

inline std::vector<BackendCase> all_backend_cases() {
  std::vector<BackendCase> cases;
  for (const CpuIsa isa : supported_isas()) {
    for (const DType dtype : {DType::f32, DType::bf16, DType::f16}) cases.push_back({isa, dtype});
  }
  return cases;
}

inline std::string case_name(const testing::TestParamInfo<BackendCase>& info) {
  return concat(name(info.param.isa), "_", name(info.param.dtype));
}

class BackendTest : public testing::TestWithParam<BackendCase>, public BackendWorkbench {
 protected:
  BackendTest() : BackendWorkbench(GetParam().isa) {}

  DType dtype() const { return GetParam().dtype; }
  Tolerance tolerance() const { return tolerance_of(dtype()); }
};

}  // namespace bitfall::test

/// Runs the suite, a class derived from BackendTest, on every case.
#define BITFALL_BACKEND_SUITE(suite)                                                            \
  INSTANTIATE_TEST_SUITE_P(Cpu, suite, testing::ValuesIn(::bitfall::test::all_backend_cases()), \
                           ::bitfall::test::case_name)
