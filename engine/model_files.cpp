#include "engine/model_files.h"

#include <algorithm>
#include <cmath>
#include <fstream>
#include <iterator>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <numbers>
#include <unordered_set>

#include "core/error.h"
#include "core/rng.h"
#include "engine/atomic_file.h"
#include "engine/safetensors.h"

namespace bitfall {
namespace {

using nlohmann::ordered_json;
namespace fs = std::filesystem;

constexpr const char* kConfigName = "config.json";
constexpr const char* kWeightsName = "model.safetensors";
constexpr const char* kIndexName = "model.safetensors.index.json";
constexpr const char* kPickleName = "pytorch_model.bin";
constexpr std::int64_t kChunkElements = 1 << 20;  // staging of 4 MB

std::string read_file(const fs::path& path) {
  std::ifstream file(path, std::ios::binary);
  check<ModelFileError>(file.is_open(), "cannot open '", path.string(), "'");
  std::string text{std::istreambuf_iterator<char>(file), {}};
  check<ModelFileError>(!file.bad(), "cannot read '", path.string(), "'");
  return text;
}

ordered_json parse_object(const std::string& text, const std::string& source) {
  try {
    ordered_json object = ordered_json::parse(text);
    check<ModelFileError>(object.is_object(), source, ": the file is not a JSON object");
    return object;
  } catch (const ordered_json::exception& error) {
    throw ModelFileError(concat(source, ": not valid JSON: ", error.what()));
  }
}

/// Says how to turn the folder's pytorch_model.bin into safetensors, with the class that wrote it.
std::string conversion_hint(const fs::path& folder) {
  std::string model_class = "BertModel";
  if (fs::exists(folder / kConfigName)) {
    const std::string source = (folder / kConfigName).string();
    const ordered_json config = parse_object(read_file(source), source);
    const auto names = config.find("architectures");
    if (names != config.end() && names->is_array() && names->size() == 1 &&
        names->front().is_string()) {
      model_class = names->front().get<std::string>();
    }
  }
  return concat("python -c \"import transformers; m = '", folder.string(), "'; transformers.",
                model_class, ".from_pretrained(m).save_pretrained(m)\"");
}

/// The weight files of a folder as one set of tensors.
class WeightFiles {
 public:
  explicit WeightFiles(const fs::path& folder) : folder_(folder) {
    if (fs::exists(folder / kWeightsName)) {
      add(folder / kWeightsName);
    } else if (fs::exists(folder / kIndexName)) {
      add_shards();
    } else {
      check<ModelFileError>(!fs::exists(folder / kPickleName), "'", folder.string(), "' has ",
                            kPickleName, " but no ", kWeightsName, ", and bitfall reads no pickles",
                            "; convert it once with: ", conversion_hint(folder));
      throw ModelFileError(concat("'", folder.string(), "' has neither ", kWeightsName, " nor ",
                                  kIndexName, ": expected a model folder of Hugging Face"));
    }
  }

  struct Found {
    const SafetensorsFile* file = nullptr;
    const SafetensorsTensor* tensor = nullptr;
  };
  /// Null pointers if no file has the tensor.
  Found find(const std::string& name) const {
    const auto found = tensors_.find(name);
    return found == tensors_.end() ? Found() : found->second;
  }
  const std::map<std::string, Found>& tensors() const { return tensors_; }
  const fs::path& folder() const { return folder_; }

 private:
  void add(const fs::path& path) {
    files_.push_back(std::make_unique<SafetensorsFile>(path));
    const SafetensorsFile* const file = files_.back().get();
    for (const SafetensorsTensor& tensor : file->tensors()) {
      check<ModelFileError>(tensors_.emplace(tensor.name, Found{file, &tensor}).second,
                            path.string(), ": tensor '", tensor.name,
                            "' is in another file of the folder too");
    }
  }

  void add_shards() {
    const std::string source = (folder_ / kIndexName).string();
    const ordered_json index = parse_object(read_file(source), source);
    const auto map = index.find("weight_map");
    check<ModelFileError>(map != index.end() && map->is_object(), source,
                          ": expected an object 'weight_map' of tensor names and file names");
    std::map<std::string, std::string> file_of;
    std::unordered_set<std::string> shards;
    for (const auto& [name, file] : map->items()) {
      const std::string shard = file.is_string() ? file.get<std::string>() : "";
      // A name with a folder in it would reach files outside of the model.
      check<ModelFileError>(!shard.empty() && fs::path(shard).filename().string() == shard, source,
                            ": tensor '", name, "' is in ", file.dump(),
                            ": expected the name of a file beside the index");
      if (shards.insert(shard).second) add(folder_ / shard);
      file_of[name] = shard;
    }
    for (const auto& [name, file] : file_of) {
      check<ModelFileError>(tensors_.count(name) != 0, source, ": tensor '", name,
                            "' should be in '", file, "' but is not");
    }
  }

  fs::path folder_;
  std::vector<std::unique_ptr<SafetensorsFile>> files_;
  std::map<std::string, Found> tensors_;
};

bool is_head(const std::string& name) {
  return !name.starts_with("bert.embeddings.") && !name.starts_with("bert.encoder.");
}

/// Names under which checkpoints may hold a parameter, the likeliest first.
std::vector<std::string> names_in_files(const std::string& name) {
  constexpr std::string_view kPrefix = "bert.";
  std::vector<std::string> names{name};
  if (name.starts_with(kPrefix)) names.push_back(name.substr(kPrefix.size()));
  for (const auto& [suffix, old_suffix] :
       {std::pair("LayerNorm.weight", "LayerNorm.gamma"), {"LayerNorm.bias", "LayerNorm.beta"}}) {
    if (!name.ends_with(suffix)) continue;
    const std::size_t count = names.size();
    for (std::size_t i = 0; i < count; ++i) {
      const std::string stem = names[i].substr(0, names[i].size() - std::string(suffix).size());
      names.push_back(stem + old_suffix);
    }
  }
  return names;
}

/// values = N(0, deviation^2) by Box and Muller, the same for a seed on every machine and rank.
void fill_normal(std::uint64_t seed, std::uint32_t parameter, float deviation,
                 std::span<float> values) {
  const PhiloxKey key{static_cast<std::uint32_t>(seed), static_cast<std::uint32_t>(seed >> 32)};
  for (std::size_t i = 0; i < values.size(); i += 2) {
    const PhiloxBlock random = philox({{static_cast<std::uint32_t>(i / 2), parameter, 0, 0}}, key);
    const double radius = std::sqrt(-2.0 * std::log(1.0 - uniform01(random.word[0])));
    const double angle = 2.0 * std::numbers::pi * uniform01(random.word[1]);
    values[i] = deviation * static_cast<float>(radius * std::cos(angle));
    if (i + 1 < values.size()) {
      values[i + 1] = deviation * static_cast<float>(radius * std::sin(angle));
    }
  }
}

Tensor host_tensor(std::vector<float>& values, const Shape& shape) {
  return {values.data(), DType::f32, shape, Device::cpu};
}

void read_parameter(const WeightFiles::Found& found, const Parameter& parameter,
                    std::span<float> values) {
  const std::vector<std::int64_t>& shape = found.tensor->shape;
  check<ModelFileError>(shape.size() <= Shape::kMaxRank &&
                            Shape(std::span<const std::int64_t>(shape)) == parameter.shape,
                        found.file->path(), ": tensor '", found.tensor->name, "' has shape ",
                        found.tensor->shape_text(), " but the model has ",
                        parameter.shape.to_string(), " for ", parameter.name,
                        "; config.json and the number of labels must fit the weights");
  found.file->read_f32(*found.tensor, values);
}

}  // namespace

std::string read_model_config(const fs::path& folder) {
  check<ModelFileError>(fs::is_directory(folder), "'", folder.string(),
                        "' is no folder: expected a model folder with ", kConfigName, " and ",
                        kWeightsName);
  return read_file(folder / kConfigName);
}

LoadReport load_model_weights(const fs::path& folder, float initializer_range, std::uint64_t seed,
                              Backend& backend, const ParameterStore& store) {
  const WeightFiles files(folder);
  LoadReport report;
  std::unordered_set<std::string> used;
  std::string missing;
  std::vector<float> values;
  for (std::size_t i = 0; i < store.parameters().size(); ++i) {
    const Parameter& parameter = store.parameters()[i];
    values.assign(static_cast<std::size_t>(parameter.numel), 0.0f);
    WeightFiles::Found found;
    for (const std::string& name : names_in_files(parameter.name)) {
      found = files.find(name);
      if (found.tensor != nullptr) break;
    }
    if (found.tensor != nullptr) {
      read_parameter(found, parameter, values);
      used.insert(found.tensor->name);
    } else if (is_head(parameter.name)) {
      report.initialized.push_back(parameter.name);
      if (parameter.shape.rank() > 1) {
        fill_normal(seed, static_cast<std::uint32_t>(i), initializer_range, values);
      }
    } else {
      missing += "\n  " + parameter.name;
    }
    backend.copy(host_tensor(values, parameter.shape), store.master(i));
  }
  check<ModelFileError>(missing.empty(), "'", folder.string(),
                        "' lacks these weights of the encoder, with and without the prefix "
                        "\"bert.\":",
                        missing);
  for (const auto& [name, found] : files.tensors()) {
    if (!used.contains(name)) report.ignored.push_back(name);
  }
  return report;
}

std::string model_config_with_head(const std::string& config_json, const HeadConfig& head,
                                   const std::vector<std::string>& label_names) {
  ordered_json config = parse_object(config_json, kConfigName);
  const auto count = static_cast<std::size_t>(head.num_labels);
  const bool span = head.type == HeadType::span;
  config["architectures"] = {span ? "BertForQuestionAnswering" : "BertForSequenceClassification"};
  config.erase("num_labels");  // follows from id2label
  config.erase("problem_type");
  if (!span) {
    config["problem_type"] =
        head.type == HeadType::regression ? "regression" : "single_label_classification";
  }
  for (const char* const key : {"dtype", "torch_dtype"}) {
    if (config.contains(key)) config[key] = "float32";
  }
  check<ConfigError>(label_names.empty() || label_names.size() == count, label_names.size(),
                     " label names for ", count, " labels");
  const auto known = config.find("id2label");
  const bool keep = label_names.empty() && known != config.end() && known->is_object() &&
                    known->size() == count && config.contains("label2id");
  if (!keep) {
    ordered_json id2label = ordered_json::object(), label2id = ordered_json::object();
    for (std::size_t i = 0; i < count; ++i) {
      const std::string name = label_names.empty() ? concat("LABEL_", i) : label_names[i];
      check<ConfigError>(!label2id.contains(name), "label name '", name, "' occurs twice");
      id2label[std::to_string(i)] = name;
      label2id[name] = i;
    }
    config["id2label"] = id2label;
    config["label2id"] = label2id;
  }
  return config.dump(2) + "\n";
}

void save_model(const fs::path& folder, const std::string& config_json, Backend& backend,
                const std::vector<Parameter>& parameters, std::span<const Tensor> weights) {
  std::error_code error;
  fs::create_directories(folder, error);
  check<ModelFileError>(!error, "cannot create '", folder.string(), "': ", error.message());

  std::vector<SafetensorsInfo> infos;
  for (const Parameter& parameter : parameters) {
    SafetensorsInfo info{parameter.name, std::string(safetensors_dtype(DType::f32)), {}};
    for (std::size_t axis = 0; axis < parameter.shape.rank(); ++axis) {
      info.shape.push_back(parameter.shape[axis]);
    }
    infos.push_back(std::move(info));
  }
  SafetensorsWriter writer(folder / kWeightsName, infos);
  std::vector<float> staging;
  for (const Tensor& tensor : weights) {
    for (std::int64_t begin = 0; begin < tensor.numel(); begin += kChunkElements) {
      const std::int64_t count = std::min(kChunkElements, tensor.numel() - begin);
      staging.resize(static_cast<std::size_t>(count));
      backend.copy(tensor.flat_slice(begin, count), host_tensor(staging, Shape{count}));
      writer.write(std::as_bytes(std::span(staging)));
    }
  }
  AtomicFile config(folder / kConfigName);
  config.write(config_json);
  writer.commit();
  config.commit();
}

}  // namespace bitfall
