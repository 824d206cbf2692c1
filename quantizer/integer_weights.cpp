#include "quantizer/integer_weights.h"

#include <algorithm>
#include <cmath>
#include <span>

#include "core/error.h"
#include "quantizer/quant_math.h"

namespace bitfall {
namespace {

QuantRange find_range(std::span<const float> group) {
  QuantRange range;
  for (const float value : group) {
    range.min_key = std::min(range.min_key, order_key(value));
    range.max_key = std::max(range.max_key, order_key(value));
  }
  return range;
}

MagnitudeSum find_sum(std::span<const float> group, float threshold) {
  MagnitudeSum total;
  for (std::size_t begin = 0; begin < group.size(); begin += kQuantSumChunk) {
    const auto chunk =
        group.subspan(begin, std::min<std::size_t>(kQuantSumChunk, group.size() - begin));
    const MagnitudeSum part =
        magnitude_sum(chunk.data(), static_cast<std::int64_t>(chunk.size()), threshold);
    total.sum += part.sum;
    total.count += part.count;
  }
  return total;
}

QuantGroup find_group(const QuantSpec& spec, std::span<const float> group) {
  const QuantRange range = find_range(group);
  if (!is_sign_quantized(spec.bits)) return uniform_group(spec.bits, spec.q_type, range);
  const MagnitudeSum all = find_sum(group, kNoThreshold);
  if (spec.bits == 1) return sign_group(range, 0.0f, all);
  const float threshold = ternary_threshold(all);
  return sign_group(range, threshold, find_sum(group, threshold));
}

float code_of(const QuantSpec& spec, const StochasticKey& key, const QuantGroup& group, float value,
              std::int64_t element) {
  if (is_sign_quantized(spec.bits)) return sign_code(value, group);
  const float offset =
      spec.rounding == Rounding::stochastic ? stochastic_offset(key, element) : 0.0f;
  return uniform_code(value, group, CodeLimits(spec.bits, spec.q_type), offset);
}

void check_finite(std::span<const float> values) {
  for (std::size_t index = 0; index < values.size(); ++index) {
    check<TrainingError>(std::isfinite(values[index]), "quantize: element ", index, " is ",
                         values[index], ": only finite weights have integer codes");
  }
}

std::int64_t packed_size(std::int64_t numel, int code_bits) { return (numel * code_bits + 7) / 8; }

}  // namespace

IntegerWeights quantize_to_integers(const QuantSpec& spec, const StochasticKey& key,
                                    const Tensor& master) {
  check<UnsupportedError>(master.dtype == DType::f32 && master.device == Device::cpu,
                          "quantize: expected f32 weights in host memory, got ",
                          name(master.dtype));
  const std::int64_t numel = master.numel();
  check_quant_spec(spec, numel);
  check<ConfigError>(spec.bits < kCastBits, "bits = ", spec.bits,
                     ": expected 1..15; from 16 bits on weights are only cast and have no codes");
  const std::span<const float> values(master.as<float>(), static_cast<std::size_t>(numel));
  check_finite(values);

  IntegerWeights result{.spec = spec, .codes = {}, .scales = {}, .zero_points = {}};
  result.codes.reserve(values.size());
  const std::size_t group_size = values.size() / static_cast<std::size_t>(spec.groups);
  for (std::size_t begin = 0; begin < values.size(); begin += group_size) {
    const QuantGroup group = find_group(spec, values.subspan(begin, group_size));
    result.scales.push_back(group.scale);
    result.zero_points.push_back(static_cast<std::int32_t>(group.zero_point));
    for (std::size_t index = begin; index < begin + group_size; ++index) {
      const std::int64_t element = key.first_element + static_cast<std::int64_t>(index);
      result.codes.push_back(
          static_cast<std::int32_t>(code_of(spec, key, group, values[index], element)));
    }
  }
  return result;
}

std::vector<float> dequantize(const IntegerWeights& weights) {
  std::vector<float> values;
  values.reserve(weights.codes.size());
  const std::size_t group_size =
      weights.codes.size() / std::max<std::size_t>(weights.scales.size(), 1);
  for (std::size_t group = 0; group < weights.scales.size(); ++group) {
    const QuantGroup shared{.scale = weights.scales[group],
                            .zero_point = static_cast<float>(weights.zero_points[group])};
    for (std::size_t index = group * group_size; index < (group + 1) * group_size; ++index)
      values.push_back(dequantize(static_cast<float>(weights.codes[index]), shared));
  }
  return values;
}

int packed_code_bits(const QuantSpec& spec) { return spec.bits <= 8 ? spec.bits : 16; }

std::int64_t packed_bytes(const QuantSpec& spec, std::int64_t numel) {
  const std::int64_t per_group = spec.q_type == QuantType::symmetric ? 4 : 8;
  return packed_size(numel, packed_code_bits(spec)) + spec.groups * per_group;
}

PackedCodes pack_codes(const IntegerWeights& weights) {
  const bool binary =
      weights.spec.bits == 1 &&
      std::find(weights.codes.begin(), weights.codes.end(), 0) == weights.codes.end();
  const int code_bits = weights.spec.bits == 1 && !binary ? 2 : packed_code_bits(weights.spec);
  const auto numel = static_cast<std::int64_t>(weights.codes.size());
  PackedCodes packed{.code_bits = code_bits, .numel = numel, .bytes = {}};
  packed.bytes.reserve(static_cast<std::size_t>(packed_size(numel, code_bits)));
  const std::uint32_t mask = (1u << code_bits) - 1;
  std::uint32_t pending = 0;  // bits that do not fill a byte yet, at most 7 + 16
  int pending_bits = 0;
  for (const std::int32_t code : weights.codes) {
    const std::uint32_t bits = binary ? (code > 0 ? 1u : 0u) : static_cast<std::uint32_t>(code);
    pending |= (bits & mask) << pending_bits;
    pending_bits += code_bits;
    for (; pending_bits >= 8; pending_bits -= 8, pending >>= 8)
      packed.bytes.push_back(static_cast<std::uint8_t>(pending));
  }
  if (pending_bits > 0) packed.bytes.push_back(static_cast<std::uint8_t>(pending));
  return packed;
}

std::vector<std::int32_t> unpack_codes(const PackedCodes& packed, QuantType q_type) {
  const int code_bits = packed.code_bits;
  check<ModelFileError>(code_bits >= 1 && code_bits <= 16, "packed codes of ", code_bits,
                        " bits: expected 1..16");
  check<ModelFileError>(
      packed.numel >= 0 && packed.numel <= (std::int64_t{1} << 58) &&
          packed_size(packed.numel, code_bits) == static_cast<std::int64_t>(packed.bytes.size()),
      "packed codes: ", packed.bytes.size(), " bytes do not hold ", packed.numel, " codes of ",
      code_bits, " bits");
  std::vector<std::int32_t> codes;
  codes.reserve(static_cast<std::size_t>(packed.numel));
  const std::uint32_t mask = (1u << code_bits) - 1;
  const std::uint32_t sign = q_type == QuantType::symmetric ? 1u << (code_bits - 1) : 0u;
  std::uint32_t pending = 0;
  int pending_bits = 0;
  auto next = packed.bytes.begin();
  for (std::int64_t index = 0; index < packed.numel; ++index) {
    for (; pending_bits < code_bits; pending_bits += 8)
      pending |= static_cast<std::uint32_t>(*next++) << pending_bits;
    const std::uint32_t bits = pending & mask;
    // The exclusive or and the difference extend the sign bit.
    const auto extended = static_cast<std::int32_t>(bits ^ sign) - static_cast<std::int32_t>(sign);
    codes.push_back(code_bits == 1 ? (bits != 0 ? 1 : -1) : extended);
    pending >>= code_bits;
    pending_bits -= code_bits;
  }
  return codes;
}

}  // namespace bitfall
