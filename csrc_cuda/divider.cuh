// Many quotients by one number, without the reciprocal and the checks for extreme operands that
// each division brings along.
#pragma once

#include "csrc_cuda/element.cuh"
#include "quantizer/quant_math.h"

namespace bitfall {

/// x / divisor, rounded as IEEE 754 demands, for 2^-60 <= |x / divisor| <= 2^22; smaller quotients
/// are smaller than 2^-59. NaN if either is NaN.
///
/// Where the reciprocal is correctly rounded, the step q + (x - q divisor) reciprocal in fused
/// multiply-adds turns a quotient that is off by one unit in the last place into the correctly
/// rounded one (Markstein, "Computation of elementary functions on the IBM RISC System/6000
/// processor", IBM Journal of Research and Development 34, 1990). The first product is off by two,
/// so it takes two steps. Both numbers are brought to where no step overflows or loses bits.
class Divider {
 public:
  /// `divisor`: positive, or NaN.
  __device__ explicit Divider(float divisor) {
    const int exponent = static_cast<int>(__float_as_uint(divisor) >> 23) - 127;
    factor_ = power_of_two(max(-126, min(-exponent, 127)));
    divisor_ = divisor * factor_;
    reciprocal_ = 1.0f / divisor_;
  }
  __device__ float operator()(float x) const {
    const float scaled = x * factor_;
    return refined(scaled, refined(scaled, scaled * reciprocal_));
  }

 private:
  __device__ float refined(float x, float quotient) const {
    return __fmaf_rn(__fmaf_rn(-quotient, divisor_, x), reciprocal_, quotient);
  }

  float factor_, divisor_, reciprocal_;
};

}  // namespace bitfall
