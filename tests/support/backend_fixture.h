// Fixture of tests that run on every instruction set of this CPU, and on a GPU, in every compute
// dtype.
#pragma once

#include <gtest/gtest.h>

#include <cstdint>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "csrc_cpu/cpu_backend.h"
#include "engine/cuda_library.h"
#include "tests/support/compare.h"
#include "tests/support/mirrored_backend.h"

namespace bitfall::test {

struct BackendCase {
  CpuIsa isa;
  DType dtype;
  Device device = Device::cpu;
};

/// Null for a GPU that is not there.
inline std::unique_ptr<Backend> make_test_backend(const BackendCase& which) {
  if (which.device == Device::cpu) return std::make_unique<CpuBackend>(which.isa);
  const CudaLibrary& cuda = cuda_library();
  if (!cuda.problem.empty()) return nullptr;
  return std::make_unique<MirroredBackend>(cuda.plugin->make_backend(0, {}));
}

/// A backend and tensors that live as long as the test.
class BackendWorkbench {
 public:
  explicit BackendWorkbench(CpuIsa isa) : backend_(std::make_unique<CpuBackend>(isa)) {}
  explicit BackendWorkbench(const BackendCase& which) : backend_(make_test_backend(which)) {}

  bool has_backend() const { return backend_ != nullptr; }
  Backend& backend() { return *backend_; }

  Tensor zeros(const Shape& shape, DType dtype) {
    if (!has_backend()) return {};  // of a member, before SetUp skips the test
    const auto numel = static_cast<std::size_t>(shape.numel());
    // One element at least: an empty tensor is not an absent one.
    buffers_.push_back(backend_->allocate((numel + 1) * size_in_bytes(dtype)));
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
  std::unique_ptr<Backend> backend_;
  std::vector<Buffer> buffers_;
  std::mt19937 generator_{20210527};
};

/// Backend::fake_quantize of a whole tensor in one way.
inline void fake_quantize(Backend& backend, const QuantSpec& spec, const StochasticKey& key,
                          float mix, const Tensor& master, const Tensor& working) {
  const FakeQuantizeRange all{0, master.numel(), spec, key, mix};
  backend.fake_quantize({&all, 1}, master, working);
}

inline std::vector<BackendCase> backend_cases(std::initializer_list<DType> dtypes) {
  std::vector<BackendCase> cases;
  for (const CpuIsa isa : supported_isas()) {
    for (const DType dtype : dtypes) cases.push_back({isa, dtype});
  }
  for (const DType dtype : dtypes) cases.push_back({CpuIsa::generic, dtype, Device::cuda});
  return cases;
}

inline std::vector<BackendCase> all_backend_cases() {
  return backend_cases({DType::f32, DType::bf16, DType::f16});
}

inline std::string case_name(const testing::TestParamInfo<BackendCase>& info) {
  const bool on_cpu = info.param.device == Device::cpu;
  return concat(on_cpu ? name(info.param.isa) : "cuda", "_", name(info.param.dtype));
}

class BackendTest : public testing::TestWithParam<BackendCase>, public BackendWorkbench {
 protected:
  BackendTest() : BackendWorkbench(GetParam()) {}

  void SetUp() override {
    if (!has_backend()) GTEST_SKIP() << "no GPU: " << cuda_library().problem;
  }

  /// Whether the backend refuses what only the content of a tensor shows; a GPU would have to wait.
  bool checks_content() const { return GetParam().device == Device::cpu; }
  DType dtype() const { return GetParam().dtype; }
  Tolerance tolerance() const { return tolerance_of(dtype()); }
};

}  // namespace bitfall::test

/// Runs the suite, a class derived from BackendTest, on every case.
#define BITFALL_BACKEND_SUITE(suite)                                                            \
  INSTANTIATE_TEST_SUITE_P(All, suite, testing::ValuesIn(::bitfall::test::all_backend_cases()), \
                           ::bitfall::test::case_name)
