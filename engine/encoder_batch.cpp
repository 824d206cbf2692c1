#include "engine/encoder_batch.h"

#include <algorithm>
#include <cstddef>
#include <initializer_list>

#include "core/error.h"

namespace bitfall {
namespace {

template <typename T>
void check_size(const char* what, const std::vector<T>& values, std::int64_t expected) {
  check<ShapeError>(static_cast<std::int64_t>(values.size()) == expected, "batch.", what, " has ",
                    values.size(), " entries, expected ", expected);
}

void check_range(const char* what, const std::vector<std::int32_t>& values, std::int64_t limit,
                 const char* limit_name) {
  for (std::size_t i = 0; i < values.size(); ++i) {
    check<ShapeError>(values[i] >= 0 && values[i] < limit, "batch.", what, "[", i,
                      "] = ", values[i], ": expected 0..", limit - 1, " (", limit_name,
                      " of the model is ", limit, ")");
  }
}

void check_key_lengths(const Batch& batch) {
  if (batch.key_lengths.empty()) return;
  check_size("key_lengths", batch.key_lengths, batch.num_sequences());
  for (std::size_t b = 0; b < batch.key_lengths.size(); ++b) {
    const std::int32_t length = batch.sequence_starts[b + 1] - batch.sequence_starts[b];
    check<ShapeError>(batch.key_lengths[b] >= 1 && batch.key_lengths[b] <= length,
                      "batch.key_lengths[", b, "] = ", batch.key_lengths[b], ": expected 1..",
                      length, ", the tokens of its sequence");
  }
}

/// Host memory laid out as tensors lie on the device, which it reaches in one copy. Zero where
/// nothing is set.
class HostImage {
 public:
  /// `tensors` lie closely together; absent ones are not part of the image.
  explicit HostImage(std::initializer_list<Tensor> tensors) {
    const std::byte* end = nullptr;
    for (const Tensor& tensor : tensors) {
      if (!tensor) continue;
      auto* const data = tensor.as<std::byte>();
      if (begin_ == nullptr || data < begin_) begin_ = data;
      end = std::max<const std::byte*>(end, data + tensor.bytes());
      device_ = tensor.device;
    }
    bytes_.resize(static_cast<std::size_t>(end - begin_));
  }

  template <typename T>
  T* of(const Tensor& tensor) {
    return reinterpret_cast<T*>(bytes_.data() + (tensor.as<std::byte>() - begin_));
  }
  template <typename T>
  void set(const Tensor& tensor, const std::vector<T>& values) {
    if (!tensor) return;
    const auto room = static_cast<std::size_t>(tensor.numel());
    std::copy_n(values.begin(), std::min(room, values.size()), of<T>(tensor));
  }

  void upload(Backend& backend) {
    const Shape shape{static_cast<std::int64_t>(bytes_.size())};
    backend.copy({bytes_.data(), DType::s8, shape, Device::cpu},
                 {begin_, DType::s8, shape, device_});
  }

 private:
  std::vector<std::byte> bytes_;
  std::byte* begin_ = nullptr;  ///< on the device
  Device device_ = Device::cpu;
};

}  // namespace

void check_batch(const Batch& batch, const EncoderConfig& config) {
  const std::vector<std::int32_t>& starts = batch.sequence_starts;
  check<ShapeError>(starts.size() >= 2, "batch.sequence_starts has ", starts.size(),
                    " entries: expected one per sequence and one more, at least 2");
  check<ShapeError>(starts.front() == 0, "batch.sequence_starts[0] = ", starts.front(),
                    ": expected 0");
  check<ShapeError>(starts.back() == batch.num_tokens(), "batch.sequence_starts ends with ",
                    starts.back(), " but there are ", batch.num_tokens(), " input_ids");
  for (std::size_t i = 1; i < starts.size(); ++i) {
    const std::int64_t length = std::int64_t{starts[i]} - starts[i - 1];
    check<ShapeError>(length > 0 && length <= config.max_position_embeddings, "sequence ", i - 1,
                      " of the batch has ", length, " tokens: expected 1..",
                      config.max_position_embeddings, " (max_position_embeddings of the model)");
  }
  check_size("sample_keys", batch.sample_keys, batch.num_sequences());
  check_key_lengths(batch);
  check_range("input_ids", batch.input_ids, config.vocab_size, "vocab_size");
  if (!batch.token_type_ids.empty()) {
    check_size("token_type_ids", batch.token_type_ids, batch.num_tokens());
    check_range("token_type_ids", batch.token_type_ids, config.type_vocab_size, "type_vocab_size");
  }
  if (!batch.position_ids.empty()) {
    check_size("position_ids", batch.position_ids, batch.num_tokens());
    check_range("position_ids", batch.position_ids, config.max_position_embeddings,
                "max_position_embeddings");
  }
}

void EncoderBatch::plan(Workspace& workspace, const Batch& batch, std::int64_t token_multiple) {
  num_tokens = (batch.num_tokens() + token_multiple - 1) / token_multiple * token_multiple;
  num_sequences = batch.num_sequences();
  const std::int64_t attended = num_sequences + (token_multiple > 1 ? 1 : 0);
  const auto integers = [&workspace](const Shape& shape) {
    return workspace.take(DType::s32, shape);
  };
  ids = {integers({num_tokens}), integers({num_tokens}), integers({num_tokens})};
  sequence_starts = integers({attended + 1});
  key_lengths = batch.key_lengths.empty() ? Tensor() : integers({attended});
  sample_keys = integers({attended});
  row_keys = integers({num_tokens, 2});
  first_tokens = integers({num_sequences});
  first_token_keys = integers({num_sequences, 2});
  class_labels = batch.class_labels.empty() ? Tensor() : integers({num_sequences});
  regression_labels =
      batch.regression_labels.empty() ? Tensor() : workspace.take(DType::f32, Shape{num_sequences});
  span_positions = batch.span_positions.empty() ? Tensor() : integers({num_sequences, 2});
}

void EncoderBatch::upload(Backend& backend, const Batch& batch, std::uint32_t step) const {
  HostImage image({ids.input_ids, ids.position_ids, ids.token_type_ids, sequence_starts,
                   key_lengths, sample_keys, row_keys, first_tokens, first_token_keys, class_labels,
                   regression_labels, span_positions});
  auto* position_id = image.of<std::int32_t>(ids.position_ids);
  auto* row_key = image.of<std::int32_t>(row_keys);
  auto* first_key = image.of<std::int32_t>(first_token_keys);
  std::vector<std::int32_t> keys;
  for (std::size_t b = 0; b + 1 < batch.sequence_starts.size(); ++b) {
    const std::int32_t length = batch.sequence_starts[b + 1] - batch.sequence_starts[b];
    const auto sample = static_cast<std::uint32_t>(batch.sample_keys[b]);
    keys.push_back(static_cast<std::int32_t>(sample_key_in_step(sample, step)));
    *first_key = keys.back();
    first_key += 2;  // at position 0
    for (std::int32_t position = 0; position < length; ++position) {
      *position_id++ = position;
      *row_key++ = keys.back();
      *row_key++ = position;
    }
  }
  image.set(ids.input_ids, batch.input_ids);
  if (!batch.position_ids.empty()) image.set(ids.position_ids, batch.position_ids);
  if (!batch.token_type_ids.empty()) image.set(ids.token_type_ids, batch.token_type_ids);
  image.set(sequence_starts, batch.sequence_starts);
  auto* const starts = image.of<std::int32_t>(sequence_starts);
  starts[sequence_starts.numel() - 1] = static_cast<std::int32_t>(num_tokens);
  image.set(key_lengths, batch.key_lengths);
  image.set(sample_keys, keys);
  image.set(first_tokens, batch.sequence_starts);
  image.set(class_labels, batch.class_labels);
  image.set(regression_labels, batch.regression_labels);
  image.set(span_positions, batch.span_positions);
  image.upload(backend);
}

}  // namespace bitfall
