// The GPU's own approximations, one instruction each, without the steps that CUDA's functions add
// for numbers below 2^-126.
#pragma once

#include <cuda_runtime.h>

#include <cmath>

namespace bitfall {

inline constexpr float kLog2E = 1.44269504f;

/// 2^x, relative error below 2^-22; 0 where that is less than 2^-126.
__device__ inline float exp2_approximate(float x) {
#ifdef __CUDACC__
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#else
  const float result = std::exp2(x);
  return result < 0x1p-126f ? 0.0f : result;
#endif
}

/// 1 / x for 1 <= x <= 2^126 and infinity, within one unit in the last place.
__device__ inline float reciprocal_approximate(float x) {
#ifdef __CUDACC__
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#else
  return 1.0f / x;
#endif
}

}  // namespace bitfall
