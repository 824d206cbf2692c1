#include "engine/encoder_batch.h"

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

void copy_in(Backend& backend, const std::vector<std::int32_t>& values, const Tensor& destination) {
  // Tensor is a view for reading and writing; as a source it is only read.
  void* const data = const_cast<std::int32_t*>(values.data());
  backend.copy({data, DType::s32, destination.shape, Device::cpu}, destination);
}

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

void EncoderBatch::plan(Workspace& workspace, const Batch& batch) {
  num_tokens = batch.num_tokens();
  num_sequences = batch.num_sequences();
  const auto integers = [&workspace](const Shape& shape) {
    return workspace.take(DType::s32, shape);
  };
  ids = {integers({num_tokens}), integers({num_tokens}), integers({num_tokens})};
  sequence_starts = integers({num_sequences + 1});
  key_lengths = batch.key_lengths.empty() ? Tensor() : integers({num_sequences});
  sample_keys = integers({num_sequences});
  row_keys = integers({num_tokens, 2});
  first_tokens = integers({num_sequences});
  first_token_keys = integers({num_sequences, 2});
  class_labels = batch.class_labels.empty() ? Tensor() : integers({num_sequences});
  regression_labels =
      batch.regression_labels.empty() ? Tensor() : workspace.take(DType::f32, Shape{num_sequences});
  span_positions = batch.span_positions.empty() ? Tensor() : integers({num_sequences, 2});
}

void EncoderBatch::upload(Backend& backend, const Batch& batch) const {
  std::vector<std::int32_t> positions, keys, first_keys;
  positions.reserve(batch.input_ids.size());
  keys.reserve(2 * batch.input_ids.size());
  for (std::size_t b = 0; b + 1 < batch.sequence_starts.size(); ++b) {
    const std::int32_t length = batch.sequence_starts[b + 1] - batch.sequence_starts[b];
    first_keys.insert(first_keys.end(), {batch.sample_keys[b], 0});
    for (std::int32_t position = 0; position < length; ++position) {
      positions.push_back(position);
      keys.insert(keys.end(), {batch.sample_keys[b], position});
    }
  }
  copy_in(backend, batch.input_ids, ids.input_ids);
  copy_in(backend, batch.position_ids.empty() ? positions : batch.position_ids, ids.position_ids);
  if (batch.token_type_ids.empty()) {
    backend.fill_zero(ids.token_type_ids);
  } else {
    copy_in(backend, batch.token_type_ids, ids.token_type_ids);
  }
  copy_in(backend, batch.sequence_starts, sequence_starts);
  if (key_lengths) copy_in(backend, batch.key_lengths, key_lengths);
  copy_in(backend, batch.sample_keys, sample_keys);
  copy_in(backend, keys, row_keys);
  copy_in(backend, batch.sequence_starts, first_tokens);
  copy_in(backend, first_keys, first_token_keys);
  if (class_labels) copy_in(backend, batch.class_labels, class_labels);
  if (span_positions) copy_in(backend, batch.span_positions, span_positions);
  if (regression_labels) {
    void* const data = const_cast<float*>(batch.regression_labels.data());
    backend.copy({data, DType::f32, regression_labels.shape, Device::cpu}, regression_labels);
  }
}

}  // namespace bitfall
