// EigenvalueBoundary: eigenvalues of a model's blocks at an accumulation boundary. Spec A6.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "core/communicator.h"
#include "core/model.h"
#include "core/parameter_store.h"
#include "eigen_sched/bit_schedule.h"
#include "eigen_sched/eigenvalue_config.h"
#include "eigen_sched/eigenvalue_estimator.h"
#include "eigen_sched/hessian_vector.h"

namespace bitfall {

struct EigenvalueResult;  // engine/engine.h

/// True if boundary number `boundary` (1 for the first; skipped steps count) needs eigenvalues:
/// they are on, gas_boundary_resolution divides it, and some block would drop a bit now.
bool eigenvalues_due(const EigenvalueConfig& config, const BitSchedule& schedule,
                     std::int64_t boundary);

class EigenvalueBoundary {
 public:
  /// All arguments must outlive the object; `store` holds the weights that `model` is bound to.
  EigenvalueBoundary(const EigenvalueConfig& config, std::uint64_t seed, Backend& backend,
                     Communicator& communicator, Model& model, ParameterStore& store);

  /// Eigenvalues of the first layer_num blocks for the mean loss over the samples of all ranks, in
  /// block order; the same on every rank (collective). A rank may have no micro-batch. Throws
  /// ShapeError if none has one.
  ///
  /// The Hessian is that at store.working(), read in f32, with dropout off. Nothing of the training
  /// changes: weights keep their bits, gradients lie in memory of their own, and the model is bound
  /// to the store's working weights and gradients again, also after an exception. `step` keys the
  /// start vectors.
  std::vector<EigenvalueResult> compute(std::span<const Batch> micro_batches, std::int64_t step);

  /// Device memory kept from the first call on.
  std::size_t scratch_bytes() const {
    return weights_buffer_.bytes() + gradient_buffer_.bytes() + sum_buffer_.bytes();
  }

 private:
  int num_blocks() const;
  /// store.working() itself if it is f32, otherwise a copy in f32.
  Tensor f32_weights();
  Tensor gradient_scratch();
  PowerIterationResult estimate(int block, std::int64_t step, const Tensor& weights,
                                std::span<const Batch> micro_batches, DifferenceHessian& hessian);
  /// This rank's share of the gradient with respect to the parameters of `block`.
  Tensor gradient(int block, std::span<const Batch> micro_batches);
  /// What each sample weighs in a sum over which ranks then take the mean.
  double sample_weight(std::span<const Batch> micro_batches);

  EigenvalueConfig config_;
  std::uint64_t seed_;
  Backend& backend_;
  Communicator& communicator_;
  Model& model_;
  ParameterStore& store_;
  EigenvalueEstimator estimator_;
  double sample_weight_ = 0;
  Buffer weights_buffer_, gradient_buffer_, sum_buffer_;
};

}  // namespace bitfall
