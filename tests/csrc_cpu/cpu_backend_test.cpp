#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <fstream>
#include <limits>
#include <string>

#include "tests/support/backend_fixture.h"

namespace bitfall::test {
namespace {

TEST(CpuBackend, AllocatesZeroedAlignedMemory) {
  CpuBackend backend(CpuIsa::generic);
  for (const std::size_t bytes : {1u, 64u, 1000u}) {
    const Buffer buffer = backend.allocate(bytes);
    EXPECT_EQ(reinterpret_cast<std::uintptr_t>(buffer.memory().get()) % 64, 0u);
    const Tensor view = buffer.view(DType::s8, Shape{static_cast<std::int64_t>(bytes)});
    for (std::size_t i = 0; i < bytes; ++i) EXPECT_EQ(view.as<std::int8_t>()[i], 0);
  }
}

TEST(CpuBackend, RefusesAnImpossibleAllocationWithTheNumberOfBytes) {
  CpuBackend backend(CpuIsa::generic);
  for (const std::size_t bytes : {std::numeric_limits<std::size_t>::max(), std::size_t{1} << 62}) {
    try {
      backend.allocate(bytes);
      FAIL() << "no error";
    } catch (const BackendError& error) {
      EXPECT_NE(std::string(error.what()).find(std::to_string(bytes)), std::string::npos);
    }
  }
}

TEST(CpuBackend, CopiesAndFillsWithZero) {
  BackendWorkbench bench(CpuIsa::generic);
  const Tensor source = bench.random(Shape{3, 5}, DType::f16);
  const Tensor destination = bench.zeros(Shape{15}, DType::f16);
  bench.backend().copy(source, destination);
  EXPECT_TRUE(identical(source, destination));
  bench.backend().fill_zero(destination);
  EXPECT_EQ(values(destination), std::vector<double>(15, 0.0));
  EXPECT_THROW(bench.backend().copy(source, bench.zeros(Shape{14}, DType::f16)), ShapeError);
  EXPECT_THROW(bench.backend().copy(source, bench.zeros(Shape{15}, DType::bf16)), UnsupportedError);
  bench.backend().copy({}, {});
}

std::int64_t resident_bytes() {
  std::ifstream file("/proc/self/statm");
  std::int64_t pages = 0;
  file >> pages >> pages;
  return pages * sysconf(_SC_PAGESIZE);
}

TEST(CpuBackend, ZeroingLeavesMemoryThatNobodyWroteWithTheSystem) {
  CpuBackend backend(CpuIsa::generic);
  constexpr std::int64_t kNumel = std::int64_t{1} << 23;
  const std::int64_t before = resident_bytes();
  const Buffer buffer = backend.allocate(kNumel * sizeof(float));
  auto* const values = static_cast<float*>(buffer.memory().get());
  const Tensor all = buffer.view(DType::f32, Shape{kNumel});
  values[5] = values[99] = values[2000000] = values[kNumel - 1] = -0.0f;
  // Neither end lies at a page's.
  backend.fill_zero(all.flat_slice(6, kNumel - 7));
  EXPECT_LT(resident_bytes(), before + kNumel * 2);
  EXPECT_TRUE(std::signbit(values[5]) && std::signbit(values[kNumel - 1]));
  EXPECT_FALSE(std::signbit(values[99]) || std::signbit(values[2000000]));
  std::fill_n(values, kNumel, 1.0f);
  backend.fill_zero(all.flat_slice(100, kNumel - 200));
  EXPECT_EQ(std::count(values, values + kNumel, 1.0f), 200);
}

TEST(CpuIsa, EnvironmentForcesALevelAndListsThePossibleOnes) {
  ASSERT_EQ(setenv("BITFALL_CPU_ISA", "generic", 1), 0);
  EXPECT_EQ(choose_isa(), CpuIsa::generic);
  ASSERT_EQ(setenv("BITFALL_CPU_ISA", "neon", 1), 0);
  try {
    choose_isa();
    FAIL() << "no error";
  } catch (const UnsupportedError& error) {
    EXPECT_NE(std::string(error.what()).find("'neon'"), std::string::npos);
    EXPECT_NE(std::string(error.what()).find("generic"), std::string::npos);
  }
  ASSERT_EQ(unsetenv("BITFALL_CPU_ISA"), 0);
  EXPECT_EQ(choose_isa(), supported_isas().back());
}

TEST(CpuIsa, EveryLevelHasItsOwnKernels) {
  EXPECT_NE(kernel_table(CpuIsa::generic).elementwise, kernel_table(CpuIsa::avx2).elementwise);
  EXPECT_NE(kernel_table(CpuIsa::avx512).layer_norm, kernel_table(CpuIsa::avx512_bf16).layer_norm);
}

}  // namespace
}  // namespace bitfall::test
