// Reading tensors as doubles, and comparing them with a message that says where they differ.
#pragma once

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <string>
#include <vector>

#include "core/tensor.h"

namespace bitfall::test {

/// Every element of a host tensor as double.
inline std::vector<double> values(const Tensor& tensor) {
  std::vector<double> result(static_cast<std::size_t>(tensor.numel()));
  for (std::size_t i = 0; i < result.size(); ++i) {
    if (tensor.dtype == DType::s32) {
      result[i] = tensor.as<std::int32_t>()[i];
    } else {
      visit_dtype(tensor.dtype, [&](auto tag) {
        result[i] = to_float(tensor.as<typename decltype(tag)::type>()[i]);
      });
    }
  }
  return result;
}

/// How far a result may be from the truth: |actual - expected| <= absolute + relative * |expected|.
struct Tolerance {
  double absolute = 0, relative = 0;
};

/// What a result computed in f32 and stored in `dtype` deserves, for numbers near 1.
inline Tolerance tolerance_of(DType dtype) {
  switch (dtype) {
    case DType::bf16:
      return {1e-2, 1e-2};
    case DType::f16:
      return {2e-3, 2e-3};
    default:
      return {2e-5, 2e-5};
  }
}

/// Success, or a failure that names the first bad index with both values and counts the bad ones.
inline testing::AssertionResult close(const std::vector<double>& actual,
                                      const std::vector<double>& expected, Tolerance tolerance) {
  if (actual.size() != expected.size()) {
    return testing::AssertionFailure()
           << actual.size() << " elements, expected " << expected.size();
  }
  std::size_t bad = 0, first = 0;
  for (std::size_t i = actual.size(); i-- > 0;) {
    const double allowed = tolerance.absolute + tolerance.relative * std::fabs(expected[i]);
    // Written so that a NaN is bad.
    if (std::fabs(actual[i] - expected[i]) <= allowed) continue;
    ++bad;
    first = i;
  }
  if (bad == 0) return testing::AssertionSuccess();
  return testing::AssertionFailure()
         << bad << " of " << actual.size() << " differ; first at " << first << ": " << actual[first]
         << ", expected " << expected[first];
}

inline testing::AssertionResult close(const Tensor& actual, const std::vector<double>& expected,
                                      Tolerance tolerance) {
  return close(values(actual), expected, tolerance);
}

/// The same bytes.
inline testing::AssertionResult identical(const Tensor& actual, const Tensor& expected) {
  if (actual.bytes() != expected.bytes())
    return testing::AssertionFailure() << actual.bytes() << " and " << expected.bytes() << " bytes";
  const std::size_t size = size_in_bytes(actual.dtype);
  for (std::size_t byte = 0; byte < actual.bytes(); ++byte) {
    if (actual.as<std::byte>()[byte] == expected.as<std::byte>()[byte]) continue;
    const std::size_t i = byte / size;
    return testing::AssertionFailure() << "first difference at " << i << ": " << values(actual)[i]
                                       << " and " << values(expected)[i];
  }
  return testing::AssertionSuccess();
}

}  // namespace bitfall::test
