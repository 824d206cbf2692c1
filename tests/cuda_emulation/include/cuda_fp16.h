#pragma once

#include "core/dtype.h"

struct __half {
  std::uint16_t bits;
};

inline float __half2float(__half value) { return bitfall::to_float(bitfall::Float16{value.bits}); }
inline __half __float2half_rn(float value) {
  return {bitfall::from_float<bitfall::Float16>(value).bits};
}
inline __half __ushort_as_half(std::uint16_t bits) { return {bits}; }
inline std::uint16_t __half_as_ushort(__half value) { return value.bits; }

struct __half2 {
  __half x, y;
};
inline __half2 __floats2half2_rn(float x, float y) {
  return {__float2half_rn(x), __float2half_rn(y)};
}
