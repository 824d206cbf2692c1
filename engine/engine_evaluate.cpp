// Engine: evaluation and what can be said of the quantized weights.
#include <cmath>

#include "core/error.h"
#include "engine/eigenvalue_boundary.h"
#include "engine/engine.h"
#include "quantizer/integer_weights.h"

namespace bitfall {
namespace {

constexpr int kUnquantizedBits = 32;

std::vector<float> floats_on_host(Backend& backend, const Tensor& tensor) {
  std::vector<float> values(static_cast<std::size_t>(tensor.numel()));
  backend.copy(tensor, Tensor{values.data(), DType::f32, tensor.shape, Device::cpu});
  return values;
}

}  // namespace

Tensor Engine::evaluation_weights() {
  if (!quantizer_) return store_.master();
  const Shape shape{store_.numel()};
  if (evaluation_buffer_.bytes() == 0) {
    evaluation_buffer_ =
        backend_->allocate(static_cast<std::size_t>(store_.numel()) * sizeof(float));
    quantizer_->quantize_into(*backend_, store_, state_.global_step,
                              evaluation_buffer_.view(DType::f32, shape));
    binding_ = Binding::none;
  }
  return evaluation_buffer_.view(DType::f32, shape);
}

Evaluation Engine::evaluate(const Batch& batch) {
  const Tensor weights = evaluation_weights();
  if (binding_ != Binding::evaluation) {
    model_->bind(store_.views(weights), {});
    binding_ = Binding::evaluation;
  }
  model_->forward(batch, {Mode::evaluate, 0, 0});
  Evaluation result;
  result.logits = floats_on_host(*backend_, model_->logits());
  result.logits_shape = model_->logits().shape;
  if (model_->loss()) result.loss = floats_on_host(*backend_, model_->loss()).front();
  return result;
}

std::map<std::string, double> Engine::quantization_error() {
  std::map<std::string, double> errors;
  if (!quantizer_) return errors;
  const Tensor quantized = evaluation_weights();
  const std::vector<Parameter>& parameters = store_.parameters();
  Buffer buffer;
  for (std::size_t index = 0; index < parameters.size(); ++index) {
    if (!quantizer_->selects(index)) continue;
    const Parameter& parameter = parameters[index];
    const Tensor master = store_.master(index).reshaped(Shape{parameter.numel});
    if (buffer.bytes() < master.bytes()) buffer = backend_->allocate(master.bytes());
    const Tensor difference = buffer.view(DType::f32, master.shape);
    backend_->copy(quantized.flat_slice(parameter.offset, parameter.numel), difference);
    backend_->axpby(-1.0f, master, 1.0f, difference);
    const double norm = backend_->squared_sum(master);
    errors[parameter.name] = norm == 0 ? 0.0 : std::sqrt(backend_->squared_sum(difference) / norm);
  }
  return errors;
}

std::map<std::string, QuantizedSize> Engine::quantized_sizes() const {
  std::map<std::string, QuantizedSize> sizes;
  for (std::size_t index = 0; index < store_.parameters().size(); ++index) {
    const Parameter& parameter = store_.parameters()[index];
    QuantizedSize size{parameter.numel, kUnquantizedBits, parameter.numel * 4, parameter.numel * 4};
    // At 16 bits a weight is cast, which has no integer codes.
    if (quantizer_ && quantizer_->selects(index)) {
      const QuantSpec spec = quantizer_->spec(index);
      size.bits = spec.bits;
      size.bytes_quantized =
          spec.bits < 16 ? packed_bytes(spec, parameter.numel) : parameter.numel * 2;
    }
    sizes[parameter.name] = size;
  }
  return sizes;
}

std::map<std::string, std::int64_t> Engine::memory_bytes() const {
  const auto bytes = [](std::size_t count) { return static_cast<std::int64_t>(count); };
  return {{"master", bytes(store_.master().bytes())},
          {"working", store_.working_is_master() ? 0 : bytes(store_.working().bytes())},
          {"gradient", bytes(store_.gradient().bytes())},
          {"optimizer", bytes(optimizer_.exp_avg().bytes() + optimizer_.exp_avg_sq().bytes())},
          {"evaluation", bytes(evaluation_buffer_.bytes())},
          {"eigenvalues", eigenvalues_ ? bytes(eigenvalues_->scratch_bytes()) : 0}};
}

}  // namespace bitfall
