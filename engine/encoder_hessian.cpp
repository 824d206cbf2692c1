// Exact Hessian products of the encoder: tangents of a forward and a backward pass, from the block
// whose weights move up to the loss and back down to it. Blocks below have no tangents.
#include <bit>
#include <string>

#include "core/checks.h"
#include "engine/encoder.h"

namespace bitfall {
namespace {

void check_parallel(const char* what, std::span<const Tensor> tensors,
                    const std::vector<ParameterSpec>& specs, DType dtype) {
  const std::string operation = concat("hessian_product: ", what);
  check<ShapeError>(tensors.size() == specs.size(), operation, " has ", tensors.size(),
                    " tensors, expected the ", specs.size(), " parameters of its block");
  for (std::size_t i = 0; i < specs.size(); ++i) {
    check_tensor(operation.c_str(), specs[i].name.c_str(), tensors[i], dtype, specs[i].shape);
  }
}

}  // namespace

void Encoder::prepare_hessian(const Batch& batch, float scale) {
  start(batch, {Mode::differentiate, 0, 0}, Purpose::hessian);
  run_forward();
  hessian_scale_ = scale;
  constexpr Differentiate kWhat = Differentiate::input_only;
  head_->backward(pass(), head_->loss_gradient(pass(), scale), kWhat, Accumulate::no,
                  hessian_.back().gradients.output);
  for (std::size_t i = layers_.size(); i-- > 0;) {
    const Tensor& d_input = i > 0 ? hessian_[i - 1].gradients.output : scratch_.d_hidden;
    layers_[i].backward(pass(), kWhat, Accumulate::no, hessian_[i].gradients, {}, d_input);
  }
  hessian_prepared_ = true;
}

void Encoder::plan_hessian() {
  scratch_.wide_tangent = workspace_.take(compute_dtype_, scratch_.wide.shape);
  for (const EncoderLayer& layer : layers_) {
    hessian_.push_back(
        {LayerGradients::plan(workspace_, scratch_, config_, compute_dtype_, device_batch_,
                              layer.rows()),
         LayerActivations::plan(workspace_, config_, compute_dtype_, device_batch_, layer.rows())});
  }
}

void Encoder::check_hessian_product(int block, std::span<const Tensor> direction,
                                    std::span<const Tensor> product) const {
  check<ShapeError>(hessian_prepared_, "hessian_product needs prepare_hessian right before it");
  check<ShapeError>(block >= 0 && block < num_layers(), "block ", block,
                    ": the model has blocks 0..", num_layers() - 1);
  const std::vector<ParameterSpec> specs = layers_[static_cast<std::size_t>(block)].parameters();
  check_parallel("direction", direction, specs, compute_dtype_);
  check_parallel("product", product, specs, DType::f32);
}

void Encoder::hessian_product(int block, std::span<const Tensor> direction,
                              std::span<const Tensor> product) {
  check_hessian_product(block, direction, product);
  RecordKey piece{static_cast<std::uint64_t>(block), std::bit_cast<std::uint32_t>(hessian_scale_)};
  for (const std::span<const Tensor> tensors : {direction, product}) {
    for (const Tensor& tensor : tensors) piece.push_back(tensor.address());
  }
  record(piece, [&] { tangent_pass(static_cast<std::size_t>(block), direction, product); });
}

void Encoder::tangent_pass(std::size_t first, std::span<const Tensor> direction,
                           std::span<const Tensor> product) {
  // Tangents travel where gradients do in training.
  const auto travelling = [this](std::size_t layer) {
    return scratch_gradients(layers_[layer]).output;
  };
  const std::span<const Tensor> held;
  for (std::size_t i = first; i < layers_.size(); ++i) {
    layers_[i].forward_tangent(pass(), hessian_[i], i == first ? direction : held,
                               scratch_.d_hidden, travelling(i));
  }
  const Tensor d_output = travelling(layers_.size() - 1);
  head_->tangent(pass(), hessian_scale_, d_output, d_output);
  for (std::size_t i = layers_.size(); i-- > first;) {
    const bool moves = i == first;
    layers_[i].backward_tangent(pass(), hessian_[i], moves ? direction : held,
                                moves ? product : held, travelling(i), scratch_.d_hidden);
  }
}

}  // namespace bitfall
