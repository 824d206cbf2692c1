// Encoder: BERT as a Model, for any size that a Hugging Face config.json describes.
//
// Packed sequences: no padding token is computed. Memory is planned per batch from one growing
// workspace, so no step after the largest allocates. In Mode::evaluate all layers share buffers.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <vector>

#include "core/model.h"
#include "engine/encoder_batch.h"
#include "engine/encoder_config.h"
#include "engine/encoder_layer.h"
#include "engine/encoder_pass.h"
#include "engine/heads.h"
#include "engine/workspace.h"

namespace bitfall {

class Encoder final : public Model {
 public:
  /// Throws ConfigError if the head cannot have so many labels.
  Encoder(Backend& backend, const EncoderConfig& config, const HeadConfig& head);
  /// BertModel without its pooler: logits() is the output for the first token of each sequence
  /// [B, H] or for every token [T, H]. Batches have no labels, so there is no loss().
  Encoder(Backend& backend, const EncoderConfig& config, OutputRows rows);

  const std::vector<ParameterSpec>& parameters() const override { return parameters_; }
  /// `gradients` may be empty for a model that only evaluates. Throws ShapeError that names the
  /// first tensor whose shape or dtype does not fit.
  void bind(std::span<const Tensor> weights, std::span<const Tensor> gradients) override;
  void forward(const Batch& batch, const ForwardContext& context) override;
  Tensor loss() const override { return head_->loss(); }
  Tensor logits() const override { return head_->logits(); }
  /// Throws ShapeError unless the last pass was forward() with labels in a mode that keeps
  /// activations, and bind() was given gradients.
  void backward(float scale, Accumulate accumulate, const BlockReady& on_block_ready) override;
  /// Throws ShapeError as backward() does, and for a d_logits of another shape or dtype.
  void backward_from(const Tensor& d_logits, Accumulate accumulate,
                     const BlockReady& on_block_ready) override;
  /// Throws ShapeError as forward() does, and for a batch without labels.
  void prepare_hessian(const Batch& batch, float scale) override;
  /// Throws ShapeError unless prepare_hessian() was the last pass, for a block that does not exist,
  /// and for tensors that do not fit its parameters.
  void hessian_product(int block, std::span<const Tensor> direction,
                       std::span<const Tensor> product) override;

  const EncoderConfig& config() const { return config_; }
  /// Device memory for activations and scratch of the largest batch so far.
  std::size_t workspace_bytes() const { return workspace_.bytes(); }

 private:
  /// Tensors around the layers: three tables, then gamma and beta of their LayerNorm.
  struct EmbeddingTensors {
    EmbeddingTables tables;
    Tensor gamma, beta;
  };
  Encoder(Backend& backend, const EncoderConfig& config, std::unique_ptr<Head> head);
  int num_layers() const { return static_cast<int>(layers_.size()); }
  EncoderPass pass() const { return {backend_, device_batch_, scratch_, context_}; }
  enum class Purpose { pass, hessian };
  /// Checks the batch, plans memory for it and copies it to the device.
  void start(const Batch& batch, const ForwardContext& context, Purpose purpose);
  void run_forward();
  void head_backward(const Tensor& d_logits, Accumulate accumulate);
  void layer_backward(std::size_t index, Accumulate accumulate);
  /// Does `work`, a piece of a pass that follows from `piece` and the pass's plan alone.
  void record(const RecordKey& piece, const std::function<void()>& work);
  RecordKey key_of_plan(Purpose purpose) const;
  void plan_scratch();
  void plan_activations(Purpose purpose);
  void plan_hessian();
  void check_backward_possible() const;
  /// Output of the embeddings [T, H], their sum on the way.
  void embeddings_forward(const Tensor& sum, const Tensor& output);
  void embeddings_backward(Accumulate accumulate);
  /// Writes the input of a layer as the forward pass had it.
  void restore_input(std::size_t layer, const Tensor& input);
  /// Memory of the gradients of a layer in training.
  LayerGradients scratch_gradients(const EncoderLayer& layer) const {
    return LayerGradients::in(scratch_, config_, layer.rows());
  }
  void tangent_pass(std::size_t first, std::span<const Tensor> direction,
                    std::span<const Tensor> product);
  void check_hessian_product(int block, std::span<const Tensor> direction,
                             std::span<const Tensor> product) const;

  Backend& backend_;
  EncoderConfig config_;
  std::unique_ptr<Head> head_;
  std::vector<EncoderLayer> layers_;
  std::vector<ParameterSpec> parameters_;

  DType compute_dtype_ = DType::f32;
  bool bound_ = false, has_gradients_ = false;
  RecordKey bound_key_;    ///< of what bind() was given
  RecordKey planned_key_;  ///< of that and what start() has planned
  EmbeddingTensors embeddings_, embedding_gradients_;

  std::unique_ptr<Recorder> recorder_;
  Workspace workspace_;
  EncoderBatch device_batch_;
  EncoderScratch scratch_;
  ForwardContext context_;
  Tensor embedding_stats_;                     ///< [T, 2] f32
  std::vector<Tensor> hidden_;                 ///< L + 1: input of each layer, then the output
  std::vector<LayerActivations> activations_;  ///< L
  std::vector<LayerHessian> hessian_;          ///< L, while a Hessian is prepared
  float hessian_scale_ = 1;
  bool hessian_prepared_ = false;
  bool backward_possible_ = false;  ///< the last pass was forward() and kept its activations
};

}  // namespace bitfall
