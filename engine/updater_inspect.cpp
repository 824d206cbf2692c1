// Updater: the weights of evaluations, and what can be said of the quantized weights.
#include <cmath>

#include "core/error.h"
#include "engine/updater.h"
#include "quantizer/integer_weights.h"

namespace bitfall {
namespace {

constexpr int kUnquantizedBits = 32;

}  // namespace

Tensor Updater::evaluation_weights() {
  if (!quantizer_) return store_.master();
  const Shape shape{store_.numel()};
  if (evaluation_buffer_.bytes() == 0) {
    evaluation_buffer_ =
        backend_.allocate(static_cast<std::size_t>(store_.numel()) * sizeof(float));
    quantizer_->quantize_into(backend_, store_, state_.global_step,
                              evaluation_buffer_.view(DType::f32, shape));
  }
  return evaluation_buffer_.view(DType::f32, shape);
}

std::map<std::string, double> Updater::quantization_error() {
  std::map<std::string, double> errors;
  if (!quantizer_) return errors;
  const Tensor quantized = evaluation_weights();
  const std::vector<Parameter>& parameters = store_.parameters();
  Buffer buffer;
  for (std::size_t index = 0; index < parameters.size(); ++index) {
    if (!quantizer_->selects(index)) continue;
    const Parameter& parameter = parameters[index];
    const Tensor master = store_.master(index).reshaped(Shape{parameter.numel});
    if (buffer.bytes() < master.bytes()) buffer = backend_.allocate(master.bytes());
    const Tensor difference = buffer.view(DType::f32, master.shape);
    backend_.copy(quantized.flat_slice(parameter.offset, parameter.numel), difference);
    backend_.axpby(-1.0f, master, 1.0f, difference);
    const double norm = backend_.squared_sum(master);
    errors[parameter.name] = norm == 0 ? 0.0 : std::sqrt(backend_.squared_sum(difference) / norm);
  }
  return errors;
}

std::map<std::string, QuantizedSize> Updater::quantized_sizes() const {
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

std::map<std::string, std::int64_t> Updater::memory_bytes() const {
  const auto bytes = [](std::size_t count) { return static_cast<std::int64_t>(count); };
  return {{"master", bytes(store_.master().bytes())},
          {"working", store_.working_is_master() ? 0 : bytes(store_.working().bytes())},
          {"gradient", bytes(store_.gradient().bytes())},
          {"optimizer", optimizer_ ? bytes(optimizer_->exp_avg().bytes() * 2) : 0},
          {"evaluation", bytes(evaluation_buffer_.bytes())}};
}

std::map<std::string, double> Updater::timings() {
  std::map<std::string, double> seconds = {{"forward", 0}, {"backward", 0}, {"all_reduce", 0},
                                           {"update", 0},  {"quantize", 0}, {"eigenvalues", 0}};
  for (const auto& [phase, value] : timer_.take()) seconds[phase] = value;
  return seconds;
}

}  // namespace bitfall
