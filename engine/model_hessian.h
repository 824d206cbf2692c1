// ModelHessian: Hessian products of a Model by differences of its gradients.
#pragma once

#include <span>
#include <vector>

#include "core/communicator.h"
#include "core/model.h"
#include "core/parameter_store.h"
#include "eigen_sched/hessian_vector.h"
#include "engine/eigenvalue_boundary.h"

namespace bitfall {

class ModelHessian final : public HessianSource {
 public:
  /// The loss is the mean over the samples of `micro_batches` on all ranks; this rank may have
  /// none. Throws ShapeError if no rank has one. All arguments must outlive the object; the model
  /// is bound to `store`'s working weights and `bound_gradients`.
  ///
  /// Nothing of the training changes: weights keep their bits, gradients lie in memory of their
  /// own, and the model is bound as before when the object goes.
  ModelHessian(Backend& backend, Communicator& communicator, Model& model,
               const ParameterStore& store, std::vector<Tensor> bound_gradients,
               std::span<const Batch> micro_batches);

  void begin_block(int block) override;
  void multiply(const Tensor& v, const Tensor& product) override;

 private:
  /// Binds the model to scratch memory, and back to what it had when it goes out of scope.
  class ScratchBinding {
   public:
    ScratchBinding(Model& model, const ParameterStore& store, std::vector<Tensor> bound_gradients,
                   const Tensor& weights, const Tensor& gradients);
    ScratchBinding(const ScratchBinding&) = delete;
    ScratchBinding& operator=(const ScratchBinding&) = delete;
    ~ScratchBinding();

   private:
    Model& model_;
    const ParameterStore& store_;
    std::vector<Tensor> bound_gradients_;
  };

  /// store.working() itself if it is f32, otherwise a copy in f32.
  Tensor f32_weights();
  /// This rank's share of the gradient with respect to the parameters of `block`.
  Tensor gradient(int block);
  /// What each sample weighs in a sum over which ranks then take the mean.
  double sample_weight(Communicator& communicator);

  Backend& backend_;
  Model& model_;
  const ParameterStore& store_;
  std::span<const Batch> micro_batches_;
  DifferenceHessian difference_;
  Buffer weights_buffer_, gradient_buffer_, sum_buffer_;
  Tensor weights_, gradient_, sum_;
  double sample_weight_;
  ScratchBinding binding_;
};

}  // namespace bitfall
