#include "core/quant_spec.h"

#include "core/error.h"

namespace bitfall {

void check_quant_spec(const QuantSpec& spec, std::int64_t numel) {
  check<ConfigError>(spec.bits >= 1 && spec.bits <= 32, "bits = ", spec.bits,
                     ": expected 1..16, or 32 for no quantization; 8 gives int8 weights");
  check<ConfigError>(
      spec.bits > 2 || (spec.q_type == QuantType::symmetric && spec.rounding == Rounding::nearest),
      "bits = ", spec.bits,
      " (ternary or binary weights): only q_type symmetric with rounding nearest is defined; use "
      "these, or 3 bits and more");
  check<ConfigError>(spec.groups >= 1, "groups = ", spec.groups, ": expected at least 1");
  check<ShapeError>(numel % spec.groups == 0, "a tensor of ", numel, " elements has no ",
                    spec.groups, " equal groups: choose a divisor of its size");
}

}  // namespace bitfall
