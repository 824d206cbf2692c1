// ModelHessian: Hessian products of a Model, as a HessianSource.
#pragma once

#include <span>
#include <vector>

#include "core/communicator.h"
#include "core/model.h"
#include "core/parameter_store.h"
#include "engine/eigenvalue_boundary.h"

namespace bitfall {

class ModelHessian final : public HessianSource {
 public:
  /// The loss is the mean over the samples of `micro_batches` on all ranks; this rank may have
  /// none. Throws ShapeError if no rank has one. All arguments must outlive the object; the model
  /// is bound to `store`'s working weights and `bound_gradients`.
  ///
  /// Nothing of the training changes: the model is bound as before when the object goes.
  ModelHessian(Backend& backend, Communicator& communicator, Model& model,
               const ParameterStore& store, std::vector<Tensor> bound_gradients,
               std::span<const Batch> micro_batches);

  void begin_block(int block) override { block_ = block; }
  void multiply(const Tensor& v, const Tensor& product) override;

 private:
  /// Binds the model to f32 weights, and back to what it had when it goes out of scope.
  class Binding {
   public:
    Binding(Model& model, const ParameterStore& store, std::vector<Tensor> bound_gradients,
            const Tensor& weights);
    Binding(const Binding&) = delete;
    Binding& operator=(const Binding&) = delete;
    ~Binding();

   private:
    Model& model_;
    const ParameterStore& store_;
    std::vector<Tensor> bound_gradients_;
  };

  /// store.working() itself if it is f32, otherwise a copy in f32.
  Tensor f32_weights();
  void prepare(std::size_t micro_batch);
  /// What each sample weighs in a sum over which ranks then take the mean.
  double sample_weight(Communicator& communicator);

  Backend& backend_;
  Model& model_;
  const ParameterStore& store_;
  std::span<const Batch> micro_batches_;
  int block_ = 0;
  Buffer weights_buffer_, part_buffer_;
  Tensor weights_;
  double sample_weight_;
  Binding binding_;
};

}  // namespace bitfall
