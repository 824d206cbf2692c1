// Element types, their conversions, and the one way to go from a run-time DType to a C++ type.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <string_view>

#include "core/error.h"

// Kernels are compiled once per instruction set; a shared out-of-line copy of a helper could carry
// instructions that another CPU lacks, so helpers used in kernels are never emitted out of line.
#if defined(__CUDACC__)
#define BITFALL_HOST_DEVICE __host__ __device__
#define BITFALL_INLINE __host__ __device__ __forceinline__
#else
#define BITFALL_HOST_DEVICE
#define BITFALL_INLINE inline __attribute__((always_inline))
#endif

namespace bitfall {

enum class DType { f32, bf16, f16, s32, s8 };

/// bfloat16: the upper half of an IEEE binary32.
struct BFloat16 {
  std::uint16_t bits;
};

/// IEEE binary16, a storage type on CPU: arithmetic happens in f32.
struct Float16 {
  std::uint16_t bits;
};

constexpr std::size_t size_in_bytes(DType dtype) {
  switch (dtype) {
    case DType::f32:
    case DType::s32:
      return 4;
    case DType::bf16:
    case DType::f16:
      return 2;
    case DType::s8:
      return 1;
  }
  return 0;
}

constexpr std::string_view name(DType dtype) {
  switch (dtype) {
    case DType::f32:
      return "f32";
    case DType::bf16:
      return "bf16";
    case DType::f16:
      return "f16";
    case DType::s32:
      return "s32";
    case DType::s8:
      return "s8";
  }
  return "?";
}

BITFALL_INLINE float to_float(float value) { return value; }

BITFALL_INLINE float to_float(BFloat16 value) {
  return std::bit_cast<float>(static_cast<std::uint32_t>(value.bits) << 16);
}

BITFALL_INLINE float to_float(Float16 value) {
  const std::uint32_t sign = (value.bits & 0x8000u) << 16;
  const std::uint32_t exponent = (value.bits >> 10) & 0x1fu;
  const std::uint32_t mantissa = value.bits & 0x3ffu;
  if (exponent == 31) return std::bit_cast<float>(sign | 0x7f800000u | (mantissa << 13));
  if (exponent != 0)
    return std::bit_cast<float>(sign | ((exponent + 112) << 23) | (mantissa << 13));
  // Subnormal halves are multiples of 2^-24, exact in f32.
  const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;
  return std::bit_cast<float>(std::bit_cast<std::uint32_t>(magnitude) | sign);
}

template <typename T>
T from_float(float value);

template <>
BITFALL_INLINE float from_float<float>(float value) {
  return value;
}

/// Round to nearest even; NaN stays a (quiet) NaN.
template <>
BITFALL_INLINE BFloat16 from_float<BFloat16>(float value) {
  const std::uint32_t bits = std::bit_cast<std::uint32_t>(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) {
    return {static_cast<std::uint16_t>((bits >> 16) | 0x40u)};
  }
  return {static_cast<std::uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}

/// Round to nearest even; beyond 65504 becomes infinity, as hardware does.
template <>
BITFALL_INLINE Float16 from_float<Float16>(float value) {
  const std::uint32_t bits = std::bit_cast<std::uint32_t>(value);
  const std::uint16_t sign = static_cast<std::uint16_t>((bits >> 16) & 0x8000u);
  const std::uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return {static_cast<std::uint16_t>(sign | 0x7e00u)};
  if (magnitude >= 0x477ff000u) return {static_cast<std::uint16_t>(sign | 0x7c00u)};
  if (magnitude < 0x38800000u) {
    // Adding 0.5 leaves the value in units of 2^-24 in the low mantissa bits, rounded to even.
    const float shifted = std::bit_cast<float>(magnitude) + 0.5f;
    return {
        static_cast<std::uint16_t>(sign | (std::bit_cast<std::uint32_t>(shifted) - 0x3f000000u))};
  }
  const std::uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
  return {static_cast<std::uint16_t>(sign | ((rounded - 0x38000000u) >> 13))};
}

/// Carries a C++ element type into a generic lambda.
template <typename T>
struct TypeTag {
  using type = T;
};

/// Calls `function(TypeTag<T>{})` for the floating dtypes f32, bf16 and f16.
///
/// Throws UnsupportedError for an integer dtype.
template <typename Function>
decltype(auto) visit_dtype(DType dtype, Function&& function) {
  switch (dtype) {
    case DType::f32:
      return function(TypeTag<float>{});
    case DType::bf16:
      return function(TypeTag<BFloat16>{});
    case DType::f16:
      return function(TypeTag<Float16>{});
    default:
      throw UnsupportedError(
          concat("expected a floating dtype (f32, bf16, f16), got ", name(dtype)));
  }
}

}  // namespace bitfall
