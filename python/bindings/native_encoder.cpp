// NativeEncoder: the BERT encoder over the memory of a torch module, one NativePass per node of its
// autograd graph. bitfall/bridge/native_encoder.py is its only user.
#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <memory>
#include <mutex>
#include <optional>

#include "engine/encoder.h"
#include "engine/factory.h"
#include "python/bindings/arrays.h"
#include "python/bindings/bindings.h"
#include "python/bindings/device.h"
#include "python/bindings/padded_batch.h"

namespace py = pybind11;

namespace bitfall::python {
namespace {

/// (data pointer, dtype, shape) of a contiguous tensor, which the caller keeps alive.
using Description = std::tuple<std::uintptr_t, std::string, std::vector<std::int64_t>>;
using Ids = std::optional<py::array>;

DType parse_dtype(const std::string& text) {
  for (const DType dtype : {DType::f32, DType::bf16, DType::f16}) {
    if (text == name(dtype)) return dtype;
  }
  throw UnsupportedError(concat("dtype ", text, ": expected f32, bf16 or f16"));
}

OutputRows parse_rows(const std::string& text) {
  check<UnsupportedError>(text == "first_token" || text == "all_tokens", "rows = '", text,
                          "': expected 'first_token' or 'all_tokens'");
  return text == "first_token" ? OutputRows::first_token : OutputRows::all_tokens;
}

PaddingTokens parse_padding(const std::string& text) {
  check<UnsupportedError>(text == "removed" || text == "computed", "padding = '", text,
                          "': expected 'removed' or 'computed'");
  return text == "removed" ? PaddingTokens::removed : PaddingTokens::computed;
}

Mode parse_mode(const std::string& text) {
  if (text == "train") return Mode::train;
  if (text == "differentiate") return Mode::differentiate;
  check<UnsupportedError>(text == "evaluate", "mode = '", text,
                          "': expected 'train', 'differentiate' or 'evaluate'");
  return Mode::evaluate;
}

/// The first token of each row must be real: an encoder's first token is its own.
void check_first_tokens(const PackedBatch& packed, std::int64_t length) {
  const std::vector<std::int32_t>& starts = packed.batch.sequence_starts;
  for (std::size_t b = 0; b + 1 < starts.size(); ++b) {
    const std::int32_t row = packed.rows[static_cast<std::size_t>(starts[b])];
    check<UnsupportedError>(row % length == 0,
                            "a row of attention_mask begins with 0, and the "
                            "output for its first token is wanted");
  }
}

/// An encoder and the packing of its last batch.
struct Slot {
  Slot(Backend& backend, const EncoderConfig& config, OutputRows output_rows)
      : encoder(backend, config, output_rows), output_rows(output_rows), workspace(backend) {}

  Encoder encoder;
  OutputRows output_rows;
  std::uint64_t binding = 0;  ///< number of the NativeEncoder::bind() that it has seen
  Workspace workspace;
  Tensor rows;               ///< [T] s32, as in PackedBatch
  Tensor d_output;           ///< [T, H] compute dtype, with OutputRows::all_tokens
  Tensor kept_row;           ///< [H] f32
  bool has_padding = false;  ///< whether a token is the embedding's padding_idx
};

class NativePass;

/// Passes whose backward is still to come have slots of their own, so any number may be waiting.
class NativeEncoder : public std::enable_shared_from_this<NativeEncoder> {
 public:
  NativeEncoder(const std::string& config, const PythonDevice& device,
                std::optional<std::int64_t> padding_idx)
      : backend_(make_backend(device)),
        config_(parse_encoder_config(config, "config")),
        padding_idx_(padding_idx.value_or(-1)) {}

  py::list parameters() const;
  void bind(const std::vector<Description>& weights, const std::vector<Description>& gradients);
  /// Writes `output`; the result is null if `keep` is off or the mode keeps nothing.
  std::shared_ptr<NativePass> forward(const PaddedBatch& padded, const std::string& rows,
                                      const std::string& padding, const std::string& mode,
                                      std::uint64_t seed, const Description& output);
  void backward(Slot& slot, const Description& d_output, Accumulate accumulate,
                const BlockReady& on_block_ready);
  void give_back(std::unique_ptr<Slot> slot);

 private:
  Tensor to_tensor(const Description& description) const;
  std::unique_ptr<Slot> take(OutputRows rows);
  void plan(Slot& slot, const PackedBatch& packed);
  void write_output(const Slot& slot, const Tensor& output);
  /// The row of the word table that torch.nn.Embedding gives no gradient, or nothing.
  Tensor padding_row(const Slot& slot) const {
    return slot.has_padding ? gradients_[0].rows(padding_idx_, 1) : Tensor();
  }

  std::mutex mutex_;  ///< held while the backend works: it has one scratch memory
  std::unique_ptr<Backend> backend_;
  EncoderConfig config_;
  std::int64_t padding_idx_;
  std::vector<Tensor> weights_, gradients_;
  std::uint64_t binding_ = 0;
  std::vector<std::unique_ptr<Slot>> free_;
};

/// One forward pass whose activations wait for its backward pass.
class NativePass {
 public:
  NativePass(std::shared_ptr<NativeEncoder> owner, std::unique_ptr<Slot> slot)
      : owner_(std::move(owner)), slot_(std::move(slot)) {}
  NativePass(const NativePass&) = delete;
  NativePass& operator=(const NativePass&) = delete;
  ~NativePass() { give_back(); }

  void backward(const Description& d_output, Accumulate accumulate,
                const BlockReady& on_block_ready) {
    check<TrainingError>(slot_ != nullptr,
                         "second backward pass through one forward pass of the native encoder: its "
                         "activations were used up by the first (retain_graph keeps none); run the "
                         "forward pass again, or under native_encoder.disabled()");
    owner_->backward(*slot_, d_output, accumulate, on_block_ready);
    give_back();
  }

 private:
  void give_back() {
    if (slot_) owner_->give_back(std::move(slot_));
  }

  std::shared_ptr<NativeEncoder> owner_;
  std::unique_ptr<Slot> slot_;
};

py::list NativeEncoder::parameters() const {
  py::list list;
  const Encoder encoder(*backend_, config_, OutputRows::all_tokens);
  for (const ParameterSpec& spec : encoder.parameters()) {
    py::list shape;
    for (std::size_t axis = 0; axis < spec.shape.rank(); ++axis) shape.append(spec.shape[axis]);
    list.append(py::make_tuple(spec.name, py::tuple(shape), spec.block,
                               spec.placement == Placement::adjacent));
  }
  return list;
}

Tensor NativeEncoder::to_tensor(const Description& description) const {
  const auto& [address, dtype, shape] = description;
  return {reinterpret_cast<void*>(address), parse_dtype(dtype), Shape(std::span(shape)),
          backend_->device()};
}

void NativeEncoder::bind(const std::vector<Description>& weights,
                         const std::vector<Description>& gradients) {
  std::vector<Tensor> bound_weights, bound_gradients;
  for (const Description& weight : weights) bound_weights.push_back(to_tensor(weight));
  for (const Description& gradient : gradients) bound_gradients.push_back(to_tensor(gradient));
  // Throws if they do not fit.
  Encoder(*backend_, config_, OutputRows::first_token).bind(bound_weights, bound_gradients);
  weights_ = std::move(bound_weights);
  gradients_ = std::move(bound_gradients);
  ++binding_;
}

std::unique_ptr<Slot> NativeEncoder::take(OutputRows rows) {
  std::unique_ptr<Slot> slot;
  const auto found = std::find_if(free_.begin(), free_.end(),
                                  [rows](const auto& one) { return one->output_rows == rows; });
  if (found == free_.end()) {
    slot = std::make_unique<Slot>(*backend_, config_, rows);
  } else {
    slot = std::move(*found);
    free_.erase(found);
  }
  if (slot->binding != binding_) slot->encoder.bind(weights_, gradients_);
  slot->binding = binding_;
  return slot;
}

void NativeEncoder::give_back(std::unique_ptr<Slot> slot) {
  const std::lock_guard<std::mutex> lock(mutex_);
  free_.push_back(std::move(slot));
}

void NativeEncoder::plan(Slot& slot, const PackedBatch& packed) {
  const std::int64_t tokens = packed.batch.num_tokens(), hidden = config_.hidden_size;
  const std::vector<std::int32_t>& ids = packed.batch.input_ids;
  slot.has_padding = std::find(ids.begin(), ids.end(), padding_idx_) != ids.end();
  slot.workspace.plan([&] {
    slot.kept_row = slot.workspace.take(DType::f32, {1, hidden});
    if (slot.output_rows == OutputRows::first_token) return;
    slot.rows = slot.workspace.take(DType::s32, {tokens});
    slot.d_output = slot.workspace.take(slot.encoder.logits().dtype, {tokens, hidden});
  });
  if (slot.output_rows == OutputRows::first_token) return;
  // Tensor is a view for reading and writing; as a source it is only read.
  void* const rows = const_cast<std::int32_t*>(packed.rows.data());
  backend_->copy({rows, DType::s32, slot.rows.shape, Device::cpu}, slot.rows);
}

void NativeEncoder::write_output(const Slot& slot, const Tensor& output) {
  const Tensor hidden_states = slot.encoder.logits();
  if (slot.output_rows == OutputRows::first_token) {
    backend_->copy(hidden_states, output);
  } else {
    backend_->scatter_rows(hidden_states, slot.rows, output);
  }
}

std::shared_ptr<NativePass> NativeEncoder::forward(const PaddedBatch& padded,
                                                   const std::string& rows,
                                                   const std::string& padding,
                                                   const std::string& mode, std::uint64_t seed,
                                                   const Description& output) {
  const OutputRows output_rows = parse_rows(rows);
  const ForwardContext context{parse_mode(mode), seed, 0};
  const PackedBatch packed = pack(padded, parse_padding(padding));
  if (output_rows == OutputRows::first_token) check_first_tokens(packed, padded.length);
  std::unique_lock<std::mutex> lock(mutex_);
  std::unique_ptr<Slot> slot = take(output_rows);
  slot->encoder.forward(packed.batch, context);
  plan(*slot, packed);
  write_output(*slot, to_tensor(output));
  lock.unlock();
  auto pass = std::make_shared<NativePass>(shared_from_this(), std::move(slot));
  return context.mode == Mode::evaluate ? nullptr : pass;
}

void NativeEncoder::backward(Slot& slot, const Description& d_output, Accumulate accumulate,
                             const BlockReady& on_block_ready) {
  const std::lock_guard<std::mutex> lock(mutex_);
  Tensor d_hidden_states = to_tensor(d_output);
  if (slot.output_rows == OutputRows::all_tokens) {
    backend_->gather_rows(d_hidden_states, slot.rows, slot.d_output);
    d_hidden_states = slot.d_output;
  }
  const Tensor unchanged = padding_row(slot);
  if (unchanged && accumulate == Accumulate::yes) {
    backend_->copy(unchanged, slot.kept_row);
  } else {
    backend_->fill_zero(slot.kept_row);
  }
  slot.encoder.backward_from(d_hidden_states, accumulate, [&](int block) {
    if (block == kNoBlock && unchanged) backend_->copy(slot.kept_row, unchanged);
    if (on_block_ready) on_block_ready(block);
  });
}

void run_backward(NativePass& self, const Description& d_output, bool accumulate,
                  const py::function& on_block_ready) {
  const auto call = [&on_block_ready](int block) {
    const py::gil_scoped_acquire acquire;
    on_block_ready(block);
  };
  const py::gil_scoped_release release;
  self.backward(d_output, accumulate ? Accumulate::yes : Accumulate::no, call);
}

PaddedBatch to_padded_batch(const py::array& input_ids, const Ids& attention_mask,
                            const Ids& token_type_ids, const Ids& position_ids) {
  check<ShapeError>(input_ids.ndim() == 2 && input_ids.size() > 0, "input_ids has ",
                    input_ids.ndim(), " dimensions and ", input_ids.size(),
                    " elements, expected [B, S] token ids");
  PaddedBatch padded;
  padded.num_sequences = input_ids.shape(0);
  padded.length = input_ids.shape(1);
  padded.input_ids = elements<std::int64_t>("input_ids", input_ids);
  const auto read = [&](const char* name, const Ids& ids) -> std::span<const std::int64_t> {
    if (!ids) return {};
    check<UnsupportedError>(
        ids->ndim() == 2 && ids->shape(0) == padded.num_sequences && ids->shape(1) == padded.length,
        name, " is not of the shape of input_ids, [", padded.num_sequences, ", ", padded.length,
        "]");
    return elements<std::int64_t>(name, *ids);
  };
  padded.attention_mask = read("attention_mask", attention_mask);
  padded.token_type_ids = read("token_type_ids", token_type_ids);
  padded.position_ids = read("position_ids", position_ids);
  return padded;
}

}  // namespace

void bind_native_encoder(py::module_& module) {
  py::class_<NativePass, std::shared_ptr<NativePass>>(module, "NativePass")
      .def("backward", &run_backward, py::arg("d_output"), py::arg("accumulate"),
           py::arg("on_block_ready"));
  py::class_<NativeEncoder, std::shared_ptr<NativeEncoder>>(module, "NativeEncoder")
      .def(py::init<const std::string&, const PythonDevice&, std::optional<std::int64_t>>(),
           py::arg("config"), py::arg("device"), py::arg("padding_idx"))
      .def("parameters", &NativeEncoder::parameters)
      .def("bind", &NativeEncoder::bind, py::arg("weights"), py::arg("gradients"))
      .def(
          "forward",
          [](NativeEncoder& self, const py::array& input_ids, const Ids& attention_mask,
             const Ids& token_type_ids, const Ids& position_ids, const std::string& rows,
             const std::string& padding, const std::string& mode, std::uint64_t seed,
             const Description& output) {
            const PaddedBatch padded =
                to_padded_batch(input_ids, attention_mask, token_type_ids, position_ids);
            const py::gil_scoped_release release;
            return self.forward(padded, rows, padding, mode, seed, output);
          },
          py::arg("input_ids"), py::arg("attention_mask"), py::arg("token_type_ids"),
          py::arg("position_ids"), py::arg("rows"), py::arg("padding"), py::arg("mode"),
          py::arg("seed"), py::arg("output"));
}

}  // namespace bitfall::python
