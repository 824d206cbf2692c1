// EigenvalueEstimator: the largest |eigenvalue| of each block's Hessian, and what the schedule
// makes of it. Spec A6.
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "eigen_sched/power_iteration.h"

namespace bitfall {

/// Keys of the start vectors: the same on every rank, different at each step and block.
struct StartVectorKey {
  std::uint64_t seed = 0;
  std::uint32_t step = 0;  ///< optimizer step
  std::uint32_t block = 0;
};

/// Random direction: independent elements with mean 0 and variance 1 into `values`.
///
/// Each is the sum of four uniform 16-bit numbers (close to normal; Irwin-Hall), so all arithmetic
/// is exact and every machine gets the same bits.
void fill_start_vector(const StartVectorKey& key, std::span<float> values);

/// ev = |l| / max|l| for each eigenvalue, in [0, 1].
///
/// NaN and infinity first take the largest finite |l| of the others; if none is finite, all ev are
/// 1. An exact 0 (no curvature seen: a failed block) gives 1.
std::vector<double> normalize_eigenvalues(std::span<const double> eigenvalues);

/// f = 1 + floor(4 ev): what a block's quantization period is stretched by. ev in [0, 1].
int eigenvalue_factor(double normalized);

class EigenvalueEstimator {
 public:
  EigenvalueEstimator(Backend& backend, const PowerIterationOptions& options);

  /// Power iteration on one block of n parameters whose Hessian is `product`.
  PowerIterationResult estimate(const StartVectorKey& key, std::int64_t n,
                                const HessianVectorProduct& product);

 private:
  Backend& backend_;
  KrylovPowerIteration power_iteration_;
  Buffer start_;
};

}  // namespace bitfall
