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
  return quantizer_ ? flat_weights(FlatContent::quantized) : master_weights();
}

Tensor Updater::master_weights() {
  if (store_.working_is_master()) return store_.working();
  if (store_.partition().world_size() == 1) return store_.master();
  return flat_weights(FlatContent::masters);
}

Tensor Updater::flat_weights(FlatContent content) {
  const Shape shape{store_.numel()};
  if (flat_buffer_.bytes() == 0) {
    flat_buffer_ = backend_.allocate(static_cast<std::size_t>(store_.numel()) * sizeof(float));
  }
  const Tensor flat = flat_buffer_.view(DType::f32, shape);
  if (flat_content_ == content) return flat;
  if (content == FlatContent::quantized) {
    quantizer_->quantize_into(backend_, store_, state_.global_step, flat);
  } else {
    const FlatRange mine = store_.owned();
    backend_.copy(store_.master(), flat.flat_slice(mine.begin, mine.numel));
  }
  gather_slices(communicator_, store_.partition(), flat);
  flat_content_ = content;
  return flat;
}

void Updater::release_evaluation_weights() {
  flat_buffer_ = Buffer();
  flat_content_ = FlatContent::none;
}

std::map<std::string, double> Updater::quantization_error() {
  if (!quantizer_) return {};
  const Tensor quantized = evaluation_weights();
  const std::vector<Parameter>& parameters = store_.parameters();
  std::vector<double> sums;  // per parameter: squares of the difference, squares of the master
  Buffer buffer;
  for (const Parameter& parameter : parameters) {
    const FlatRange mine = intersection(parameter.range(), store_.owned());
    if (mine.numel == 0) {
      sums.insert(sums.end(), 2, 0.0);
      continue;
    }
    const Tensor master = store_.master(mine);
    if (buffer.bytes() < master.bytes()) buffer = backend_.allocate(master.bytes());
    const Tensor difference = buffer.view(DType::f32, Shape{mine.numel});
    backend_.copy(quantized.flat_slice(mine.begin, mine.numel), difference);
    backend_.axpby(-1.0f, master, 1.0f, difference);
    sums.push_back(backend_.squared_sum(difference));
    sums.push_back(backend_.squared_sum(master));
  }
  if (store_.partition().world_size() > 1) sums = sum_over_ranks(communicator_, std::move(sums));
  std::map<std::string, double> errors;
  for (std::size_t index = 0; index < parameters.size(); ++index) {
    if (!quantizer_->selects(index)) continue;
    const double norm = sums[2 * index + 1];
    errors[parameters[index].name] = norm == 0 ? 0.0 : std::sqrt(sums[2 * index] / norm);
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
  const Tensor masters = store_.working_is_master() ? store_.working() : store_.master();
  return {{"master", bytes(masters.bytes())},
          {"working", store_.working_is_master() ? 0 : bytes(store_.working().bytes())},
          {"gradient", bytes(store_.gradient().bytes() + reducer_.bucket_bytes())},
          {"optimizer", optimizer_ ? bytes(optimizer_->exp_avg().bytes() * 2) : 0},
          {"evaluation", bytes(flat_buffer_.bytes())}};
}

std::map<std::string, double> Updater::timings() {
  std::map<std::string, double> seconds = {
      {"forward", 0}, {"backward", 0}, {"all_reduce", 0}, {"update", 0}, {"eigenvalues", 0}};
  for (const auto& [phase, value] : timer_.take()) seconds[phase] = value;
  return seconds;
}

}  // namespace bitfall
