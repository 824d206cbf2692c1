// QuantSpec: how one tensor is quantized. A plain value, understood by every backend.
#pragma once

#include <cstdint>

namespace bitfall {

enum class QuantType { symmetric, asymmetric };
enum class Rounding { nearest, stochastic };

struct QuantSpec {
  int bits = 16;            ///< 1..16; 16 and above is a plain cast
  std::int64_t groups = 1;  ///< equal slices of the flattened tensor, each with its own scale
  QuantType q_type = QuantType::symmetric;
  Rounding rounding = Rounding::nearest;

  bool operator==(const QuantSpec&) const = default;
};

/// Throws ConfigError for bits outside 1..32, fewer than one group, or ternary and binary weights
/// that are not symmetric and nearest; ShapeError if `numel` elements have no `groups` equal
/// slices.
void check_quant_spec(const QuantSpec& spec, std::int64_t numel);

/// Keys of the counter-based generator for stochastic rounding: the same on every rank and device.
struct StochasticKey {
  std::uint64_t seed = 0;
  std::uint64_t step = 0;
  std::uint32_t parameter = 0;     ///< index of the parameter in the store
  std::int64_t first_element = 0;  ///< of the tensor in its parameter, where it is a part of one

  bool operator==(const StochasticKey&) const = default;
};

}  // namespace bitfall
