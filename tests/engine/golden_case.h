// GoldenCase: a model of tests/goldens with its batch and PyTorch's numbers for them.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

#include "core/error.h"
#include "core/parameter_store.h"
#include "csrc_cpu/cpu_backend.h"
#include "engine/encoder.h"
#include "engine/safetensors.h"

namespace bitfall {

inline std::filesystem::path goldens_folder() { return BITFALL_GOLDENS_DIR; }

inline std::string read_text(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

inline std::vector<float> read_floats(const SafetensorsFile& file, const std::string& name) {
  const SafetensorsTensor& tensor = file.at(name);
  std::size_t numel = 1;
  for (const std::int64_t dim : tensor.shape) numel *= static_cast<std::size_t>(dim);
  std::vector<float> values(numel);
  file.read_f32(tensor, values);
  return values;
}

inline std::vector<std::int32_t> read_integers(const SafetensorsFile& file,
                                               const std::string& name) {
  const std::span<const std::byte> data = file.at(name).data;
  std::vector<std::int32_t> values(data.size() / sizeof(std::int32_t));
  std::memcpy(values.data(), data.data(), data.size());
  return values;
}

/// Elements of a CPU tensor as f32.
inline std::vector<float> to_floats(const Tensor& tensor) {
  std::vector<float> values(static_cast<std::size_t>(tensor.numel()));
  visit_dtype(tensor.dtype, [&](auto tag) {
    const auto* const data = tensor.as<typename decltype(tag)::type>();
    for (std::size_t i = 0; i < values.size(); ++i) values[i] = to_float(data[i]);
  });
  return values;
}

/// The message of the ShapeError that `action` throws, or "" if it throws none.
template <typename Action>
std::string shape_error(Action&& action) {
  try {
    action();
  } catch (const ShapeError& error) {
    return error.what();
  }
  return "";
}

/// L2 norm.
inline double norm(const std::vector<float>& values) {
  double sum = 0;
  for (const float value : values) sum += double{value} * double{value};
  return std::sqrt(sum);
}

/// L2 norm of a - b, which must be of one size.
inline double distance(const std::vector<float>& a, const std::vector<float>& b) {
  std::vector<float> difference;
  for (std::size_t i = 0; i < b.size(); ++i) difference.push_back(a.at(i) - b[i]);
  return norm(difference);
}

inline double relative_error(const std::vector<float>& seen, const std::vector<float>& expected) {
  return distance(seen, expected) / norm(expected);
}

inline Batch golden_batch(const SafetensorsFile& file, HeadType head) {
  Batch batch;
  batch.input_ids = read_integers(file, "input_ids");
  batch.token_type_ids = read_integers(file, "token_type_ids");
  batch.sequence_starts = read_integers(file, "sequence_starts");
  for (std::int32_t b = 0; b < batch.num_sequences(); ++b) batch.sample_keys.push_back(b);
  if (head == HeadType::classification) batch.class_labels = read_integers(file, "labels");
  if (head == HeadType::regression) batch.regression_labels = read_floats(file, "labels");
  if (head == HeadType::span) batch.span_positions = read_integers(file, "labels");
  return batch;
}

/// A tiny model with the golden weights, bound in `compute_dtype`.
class GoldenCase {
 public:
  GoldenCase(const std::string& name, DType compute_dtype)
      : file(goldens_folder() / (name + ".safetensors")),
        head(parse_head_type(file.metadata().at("head"))),
        model(backend,
              parse_encoder_config(read_text(goldens_folder() / (name + ".json")), name + ".json"),
              {head, file.at("logits").shape.at(1)}),
        store(backend, model.parameters(), compute_dtype, ParameterStore::WorkingCopy::separate),
        batch(golden_batch(file, head)) {
    for (std::size_t i = 0; i < store.parameters().size(); ++i) {
      const std::vector<float> values = read_floats(file, "weight." + store.parameters()[i].name);
      std::memcpy(store.master(i).data, values.data(), store.master(i).bytes());
    }
    publish();
    model.bind(store.views(store.working()), store.views(store.gradient()));
  }

  /// Working weights = master weights.
  void publish() { backend.cast(store.master(), store.working()); }

  double loss(const ForwardContext& context) {
    model.forward(batch, context);
    return model.loss().as<float>()[0];
  }

  /// Every gradient of the batch, flat.
  std::vector<float> gradients(const ForwardContext& context) {
    model.forward(batch, context);
    model.backward(1.0f, Accumulate::no, {});
    return to_floats(store.gradient());
  }

  CpuBackend backend;
  SafetensorsFile file;
  HeadType head;
  Encoder model;
  ParameterStore store;
  Batch batch;
};

}  // namespace bitfall
