#include "engine/eigenvalue_boundary.h"

#include <algorithm>
#include <cmath>

#include "core/error.h"

namespace bitfall {
namespace {

PowerIterationOptions options_of(const EigenvalueConfig& config) {
  return {config.max_iter, config.tol, config.stability};
}

}  // namespace

bool eigenvalues_due(const EigenvalueConfig& config, const BitSchedule& schedule,
                     std::int64_t boundary) {
  return config.enabled && boundary % config.gas_boundary_resolution == 0 &&
         schedule.block_would_drop();
}

EigenvalueBoundary::EigenvalueBoundary(const EigenvalueConfig& config, std::uint64_t seed,
                                       Backend& backend, Communicator& communicator,
                                       const ParameterStore& store)
    : config_(config),
      seed_(seed),
      communicator_(communicator),
      store_(store),
      estimator_(backend, options_of(config)) {}

std::vector<EigenvalueResult> EigenvalueBoundary::compute(HessianSource& hessian,
                                                          std::int64_t step) {
  const int count = num_blocks();
  std::vector<PowerIterationResult> blocks(static_cast<std::size_t>(count));
  for (int block = count - 1; block >= 0; --block) {
    blocks[static_cast<std::size_t>(block)] = estimate(block, step, hessian);
  }

  std::vector<double> values;
  for (const PowerIterationResult& block : blocks) values.push_back(block.value);
  const std::vector<double> normalized = normalize_eigenvalues(values);
  std::vector<EigenvalueResult> results;
  for (int block = 0; block < count; ++block) {
    const auto index = static_cast<std::size_t>(block);
    results.push_back({concat(config_.layer_name, ".", block), block, blocks[index].iterations,
                       blocks[index].products, blocks[index].converged, std::fabs(values[index]),
                       normalized[index], eigenvalue_factor(normalized[index])});
  }
  return results;
}

int EigenvalueBoundary::num_blocks() const {
  return config_.layer_num == 0 ? store_.num_blocks()
                                : std::min(config_.layer_num, store_.num_blocks());
}

PowerIterationResult EigenvalueBoundary::estimate(int block, std::int64_t step,
                                                  HessianSource& hessian) {
  hessian.begin_block(block);
  const StartVectorKey key{seed_, static_cast<std::uint32_t>(step),
                           static_cast<std::uint32_t>(block)};
  return estimator_.estimate(key, store_.block_range(block).numel,
                             [&](const Tensor& v, const Tensor& product) {
                               hessian.multiply(v, product);
                               communicator_.all_reduce(product, ReduceOp::mean);
                             });
}

}  // namespace bitfall
