// EigenvalueBoundary: eigenvalues of a model's blocks at an accumulation boundary. Spec A6.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "core/communicator.h"
#include "core/parameter_store.h"
#include "eigen_sched/bit_schedule.h"
#include "eigen_sched/eigenvalue_config.h"
#include "eigen_sched/eigenvalue_estimator.h"
#include "engine/step_result.h"

namespace bitfall {

/// Products with the diagonal Hessian blocks of this rank's share of the loss, of which the mean
/// over ranks is the whole loss: at the weights of the forward passes, read in f32, dropout off.
class HessianSource {
 public:
  virtual ~HessianSource() = default;
  /// Called once per block, from the last one down.
  virtual void begin_block(int block) = 0;
  /// product [n] f32 = H v of the current block, v [n] f32 of length 1.
  virtual void multiply(const Tensor& v, const Tensor& product) = 0;
};

using MakeHessian = std::function<std::unique_ptr<HessianSource>()>;

/// True if boundary number `boundary` (1 for the first; skipped steps count) needs eigenvalues:
/// they are on, gas_boundary_resolution divides it, and some block would drop a bit now.
bool eigenvalues_due(const EigenvalueConfig& config, const BitSchedule& schedule,
                     std::int64_t boundary);

class EigenvalueBoundary {
 public:
  /// All arguments must outlive the object.
  EigenvalueBoundary(const EigenvalueConfig& config, std::uint64_t seed, Backend& backend,
                     Communicator& communicator, const ParameterStore& store);

  /// Eigenvalues of the first layer_num blocks for the mean over ranks of `hessian`, in block
  /// order; the same on every rank (collective). `step` keys the start vectors.
  std::vector<EigenvalueResult> compute(HessianSource& hessian, std::int64_t step);

 private:
  int num_blocks() const;
  PowerIterationResult estimate(int block, std::int64_t step, HessianSource& hessian);

  EigenvalueConfig config_;
  std::uint64_t seed_;
  Communicator& communicator_;
  const ParameterStore& store_;
  EigenvalueEstimator estimator_;
};

}  // namespace bitfall
