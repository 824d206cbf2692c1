#include "eigen_sched/eigenvalue_estimator.h"

#include <algorithm>
#include <cmath>

#include "core/error.h"
#include "core/rng.h"

namespace bitfall {
namespace {

// Second counter word of the start vectors; dropout keeps positions of tokens there.
constexpr std::uint32_t kStartVectorStream = 0xE16E0000u;
// Mean and reciprocal standard deviation of the sum of four uniform numbers in 0..65535.
constexpr float kMean = 4 * 32767.5f;
constexpr float kScale = 1.0f / 37837.227f;

float irwin_hall(std::uint32_t first, std::uint32_t second) {
  const std::uint32_t sum = (first & 0xffffu) + (first >> 16) + (second & 0xffffu) + (second >> 16);
  return (static_cast<float>(sum) - kMean) * kScale;
}

}  // namespace

void fill_start_vector(const StartVectorKey& key, std::span<float> values) {
  const PhiloxKey philox_key{static_cast<std::uint32_t>(key.seed),
                             static_cast<std::uint32_t>(key.seed >> 32)};
  for (std::size_t i = 0; i < values.size(); i += 2) {
    const PhiloxBlock random = philox(
        {{static_cast<std::uint32_t>(i / 2), kStartVectorStream, key.block, key.step}}, philox_key);
    values[i] = irwin_hall(random.word[0], random.word[1]);
    if (i + 1 < values.size()) values[i + 1] = irwin_hall(random.word[2], random.word[3]);
  }
}

std::vector<double> normalize_eigenvalues(std::span<const double> eigenvalues) {
  double largest = -1;
  for (const double value : eigenvalues) {
    if (std::isfinite(value)) largest = std::max(largest, std::fabs(value));
  }
  std::vector<double> normalized;
  normalized.reserve(eigenvalues.size());
  for (const double value : eigenvalues) {
    const bool takes_largest = !std::isfinite(value) || value == 0 || largest <= 0;
    normalized.push_back(takes_largest ? 1.0 : std::fabs(value) / largest);
  }
  return normalized;
}

int eigenvalue_factor(double normalized) {
  return 1 + static_cast<int>(std::floor(4 * normalized));
}

EigenvalueEstimator::EigenvalueEstimator(Backend& backend, const PowerIterationOptions& options)
    : backend_(backend), power_iteration_(backend, options) {}

PowerIterationResult EigenvalueEstimator::estimate(const StartVectorKey& key, std::int64_t n,
                                                   const HessianVectorProduct& product) {
  std::vector<float> values(static_cast<std::size_t>(n));
  fill_start_vector(key, values);
  if (start_.bytes() < values.size() * sizeof(float)) {
    start_ = backend_.allocate(values.size() * sizeof(float));
  }
  const Tensor start = start_.view(DType::f32, Shape{n});
  backend_.copy({values.data(), DType::f32, Shape{n}, Device::cpu}, start);
  return power_iteration_.run(start, product);
}

}  // namespace bitfall
