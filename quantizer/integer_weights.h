// Weights as true integers: what a quantized model is worth on disk, and what other runtimes load.
#pragma once

#include <cstdint>
#include <vector>

#include "core/quant_spec.h"
#include "core/tensor.h"

namespace bitfall {

/// value[i] = (codes[i] + zero_points[g]) * scales[g], in f32, where g = i / (numel / groups).
struct IntegerWeights {
  QuantSpec spec;
  /// [numel] symmetric: -2^(bits-1) .. 2^(bits-1)-1; asymmetric: 0 .. 2^bits-1; ternary and binary:
  /// -1, 0, 1.
  std::vector<std::int32_t> codes;
  std::vector<float> scales;              ///< [groups]
  std::vector<std::int32_t> zero_points;  ///< [groups]; 0 unless asymmetric
};

/// Integer codes of `master` (f32, host memory): dequantize() gives bit for bit the f32 values that
/// Backend::fake_quantize gives with mix 0.
///
/// Throws ConfigError or ShapeError like check_quant_spec, ConfigError for 16 bits and more (a cast
/// has no codes), TrainingError if an element is NaN or infinite.
IntegerWeights quantize_to_integers(const QuantSpec& spec, const StochasticKey& key,
                                    const Tensor& master);

/// [numel] The weights that the codes stand for.
std::vector<float> dequantize(const IntegerWeights& weights);

/// Codes as a stream of bits: element i takes bits [i * code_bits, (i + 1) * code_bits), lowest bit
/// of a byte first, in two's complement (binary: 1 is +1, 0 is -1). So 8 bits are plain int8
/// (asymmetric: uint8), 16 bits little-endian int16.
struct PackedCodes {
  int code_bits = 8;
  std::int64_t numel = 0;
  std::vector<std::uint8_t> bytes;  ///< [ceil(numel * code_bits / 8)]
};

/// Bits that one packed code takes: bits up to 8, 16 above. (Binary weights of which one is exactly
/// 0 take 2: zero has no sign.)
int packed_code_bits(const QuantSpec& spec);
/// Bytes of a packed tensor: codes, scales, and zero points where asymmetric.
std::int64_t packed_bytes(const QuantSpec& spec, std::int64_t numel);

PackedCodes pack_codes(const IntegerWeights& weights);
/// The codes that were packed. `q_type` says whether they are signed. Throws ModelFileError if the
/// number of bytes does not fit numel and code_bits.
std::vector<std::int32_t> unpack_codes(const PackedCodes& packed, QuantType q_type);

}  // namespace bitfall
