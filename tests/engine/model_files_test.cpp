#include "engine/model_files.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

#include "core/error.h"
#include "tests/engine/golden_case.h"
#include "tests/support/temporary_folder.h"

namespace bitfall {
namespace {

using ::testing::Contains;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::Not;

constexpr const char* kTinyConfig =
    R"({"model_type": "bert", "vocab_size": 10, "hidden_size": 4, "num_hidden_layers": 1,
        "num_attention_heads": 2, "intermediate_size": 6, "max_position_embeddings": 8,
        "custom_key": [1, 2], "architectures": ["BertForMaskedLM"], "torch_dtype": "float16"})";

/// The message of the ErrorType that `action` throws, or "" if it throws none.
template <typename ErrorType, typename Action>
std::string message_of(Action&& action) {
  try {
    action();
  } catch (const ErrorType& error) {
    return error.what();
  }
  return "";
}

void write_text(const std::filesystem::path& path, const std::string& text) {
  std::ofstream(path, std::ios::binary) << text;
}

struct NamedTensor {
  SafetensorsInfo info;
  std::vector<float> values;
};

void write_tensors(const std::filesystem::path& path, const std::vector<NamedTensor>& tensors) {
  std::vector<SafetensorsInfo> infos;
  for (const NamedTensor& tensor : tensors) infos.push_back(tensor.info);
  SafetensorsWriter writer(path, infos);
  for (const NamedTensor& tensor : tensors) writer.write(std::as_bytes(std::span(tensor.values)));
  writer.commit();
}

class ModelFiles : public ::testing::Test {
 protected:
  /// All weights of the model under the names of its parameters, with distinct values.
  std::vector<NamedTensor> all_tensors() const {
    std::vector<NamedTensor> tensors;
    float next = 0;
    for (const Parameter& parameter : store_.parameters()) {
      NamedTensor tensor{{parameter.name, "F32", {}}, {}};
      for (std::size_t axis = 0; axis < parameter.shape.rank(); ++axis) {
        tensor.info.shape.push_back(parameter.shape[axis]);
      }
      for (std::int64_t i = 0; i < parameter.numel; ++i) tensor.values.push_back(next += 0.5f);
      tensors.push_back(tensor);
    }
    return tensors;
  }

  LoadReport load(std::uint64_t seed = 1) {
    return load_model_weights(folder_.path(), config_.initializer_range, seed, backend_, store_);
  }
  std::string load_error() {
    return message_of<ModelFileError>([this] { load(); });
  }
  std::vector<float> master(const std::string& name) const {
    return to_floats(store_.master(store_.index_of(name)));
  }
  void expect_masters(const std::vector<NamedTensor>& tensors) const {
    for (std::size_t i = 0; i < tensors.size(); ++i) {
      EXPECT_EQ(to_floats(store_.master(i)), tensors[i].values) << store_.parameters()[i].name;
    }
  }
  std::filesystem::path weights_path() const { return folder_.path() / "model.safetensors"; }

  TemporaryFolder folder_;
  CpuBackend backend_;
  EncoderConfig config_ = parse_encoder_config(kTinyConfig, "config.json");
  HeadConfig head_{HeadType::classification, 3};
  Encoder model_{backend_, config_, head_};
  ParameterStore store_{backend_, model_.parameters(), DType::f32,
                        ParameterStore::WorkingCopy::shared};
};

TEST_F(ModelFiles, WhatIsSavedIsLoaded) {
  const std::vector<NamedTensor> tensors = all_tensors();
  write_tensors(weights_path(), tensors);
  load();
  const auto copy = folder_.path() / "new" / "model";
  save_model(copy, "{}\n", backend_, store_.parameters(), store_.views(store_.master()));
  EXPECT_EQ(read_model_config(copy), "{}\n");
  backend_.fill_zero(store_.master());
  const LoadReport report = load_model_weights(copy, 0.02f, 1, backend_, store_);
  EXPECT_TRUE(report.initialized.empty());
  EXPECT_TRUE(report.ignored.empty());
  expect_masters(tensors);
}

TEST_F(ModelFiles, NamesOfBertModelAndOldNormsAreUnderstood) {
  const std::vector<NamedTensor> tensors = all_tensors();
  std::vector<NamedTensor> renamed = tensors;
  for (NamedTensor& tensor : renamed) {
    std::string& name = tensor.info.name;
    if (name.starts_with("bert.")) name = name.substr(5);
    for (const auto& [suffix, old] : {std::pair(".LayerNorm.weight", ".LayerNorm.gamma"),
                                      {".LayerNorm.bias", ".LayerNorm.beta"}}) {
      if (name.ends_with(suffix)) name.replace(name.rfind(suffix), std::string::npos, old);
    }
  }
  renamed.push_back({{"cls.predictions.bias", "F32", {2}}, {1, 2}});
  write_tensors(weights_path(), renamed);
  EXPECT_THAT(load().ignored, ElementsAre("cls.predictions.bias"));
  expect_masters(tensors);
}

TEST_F(ModelFiles, MissingHeadWeightsAreDrawnBySeed) {
  std::vector<NamedTensor> tensors = all_tensors();
  tensors.resize(tensors.size() - 4);
  write_tensors(weights_path(), tensors);
  EXPECT_THAT(load(1).initialized, ElementsAre("bert.pooler.dense.weight", "bert.pooler.dense.bias",
                                               "classifier.weight", "classifier.bias"));
  const std::vector<float> first = master("bert.pooler.dense.weight");
  EXPECT_GT(norm(first), 0.02);  // of 16 values with deviation 0.02: about 0.08
  EXPECT_LT(norm(first), 0.2);
  EXPECT_EQ(norm(master("classifier.bias")), 0);
  load(1);
  EXPECT_EQ(master("bert.pooler.dense.weight"), first);
  load(2);
  EXPECT_NE(master("bert.pooler.dense.weight"), first);
}

TEST_F(ModelFiles, MissingEncoderWeightsAreListed) {
  std::vector<NamedTensor> tensors = all_tensors();
  tensors.erase(tensors.begin() + 7);
  tensors.erase(tensors.begin());
  write_tensors(weights_path(), tensors);
  const std::string message = load_error();
  EXPECT_THAT(message, HasSubstr("bert.embeddings.word_embeddings.weight"));
  EXPECT_THAT(message, HasSubstr("bert.encoder.layer.0.attention.self.value.weight"));
  EXPECT_THAT(message, Not(HasSubstr("query")));
}

TEST_F(ModelFiles, WrongShapesAndTypesAreNamed) {
  std::vector<NamedTensor> tensors = all_tensors();
  tensors[0].info.shape = {4, 10};
  write_tensors(weights_path(), tensors);
  EXPECT_THAT(load_error(), HasSubstr("has shape [4, 10] but the model has [10, 4]"));
  tensors[0].info.shape = {1, 1, 1, 1, 40};
  write_tensors(weights_path(), tensors);
  EXPECT_THAT(load_error(), HasSubstr("has shape [1, 1, 1, 1, 40]"));
  tensors[0].info = {tensors[0].info.name, "I32", {10, 4}};
  write_tensors(weights_path(), tensors);
  EXPECT_THAT(load_error(), HasSubstr("is I32: expected F32"));
}

TEST_F(ModelFiles, ShardsAreOneModel) {
  const std::vector<NamedTensor> tensors = all_tensors();
  const auto middle = tensors.begin() + 8;
  write_tensors(folder_.path() / "a.safetensors", {tensors.begin(), middle});
  write_tensors(folder_.path() / "b.safetensors", {middle, tensors.end()});
  nlohmann::json index;
  for (auto tensor = tensors.begin(); tensor != tensors.end(); ++tensor) {
    index["weight_map"][tensor->info.name] = tensor < middle ? "a.safetensors" : "b.safetensors";
  }
  const auto index_path = folder_.path() / "model.safetensors.index.json";
  write_text(index_path, index.dump());
  load();
  expect_masters(tensors);

  nlohmann::json wrong = index;
  wrong["weight_map"]["ghost"] = "a.safetensors";
  write_text(index_path, wrong.dump());
  EXPECT_THAT(load_error(), HasSubstr("tensor 'ghost' should be in 'a.safetensors'"));
  for (const nlohmann::json& file : {nlohmann::json("../a.safetensors"), nlohmann::json("/etc/x"),
                                     nlohmann::json(""), nlohmann::json(1)}) {
    wrong["weight_map"]["ghost"] = file;
    write_text(index_path, wrong.dump());
    EXPECT_THAT(load_error(), HasSubstr("a file beside the index")) << file;
  }
  write_text(index_path, R"({"weight_map": 3})");
  EXPECT_THAT(load_error(), HasSubstr("weight_map"));
  write_text(index_path, "{");
  EXPECT_THAT(load_error(), HasSubstr("not valid JSON"));
  write_text(index_path, index.dump());
  std::filesystem::remove(folder_.path() / "b.safetensors");
  EXPECT_THAT(load_error(), HasSubstr("b.safetensors"));
}

TEST_F(ModelFiles, FoldersWithoutWeightsGetAHint) {
  EXPECT_THAT(load_error(), HasSubstr("neither model.safetensors nor"));
  write_text(folder_.path() / "pytorch_model.bin", "pickle");
  EXPECT_THAT(load_error(), HasSubstr("transformers.BertModel.from_pretrained"));
  write_text(folder_.path() / "config.json", kTinyConfig);
  EXPECT_THAT(load_error(), HasSubstr("transformers.BertForMaskedLM.from_pretrained"));
  const auto message = [](const std::filesystem::path& path) {
    return message_of<ModelFileError>([&path] { read_model_config(path); });
  };
  EXPECT_THAT(message(folder_.path() / "none"), HasSubstr("no folder"));
  std::filesystem::remove(folder_.path() / "config.json");
  EXPECT_THAT(message(folder_.path()), HasSubstr("config.json"));
}

TEST_F(ModelFiles, SavingWhereNothingCanBeWrittenKeepsTheOldModel) {
  write_text(folder_.path() / "file", "");
  const auto save = [this](const std::filesystem::path& folder) {
    save_model(folder, "{}", backend_, store_.parameters(), store_.views(store_.master()));
  };
  EXPECT_THROW(save(folder_.path() / "file"), ModelFileError);
  EXPECT_THROW(save(folder_.path() / "file" / "below"), ModelFileError);
}

TEST(ModelConfig, KeepsTheOriginalAndDescribesTheHead) {
  using nlohmann::json;
  const json config = json::parse(
      model_config_with_head(kTinyConfig, {HeadType::classification, 2}, {"no", "yes"}));
  EXPECT_EQ(config["custom_key"], json({1, 2}));
  EXPECT_EQ(config["torch_dtype"], "float32");
  EXPECT_EQ(config["architectures"], json::array({"BertForSequenceClassification"}));
  EXPECT_EQ(config["problem_type"], "single_label_classification");
  EXPECT_EQ(config["id2label"], (json{{"0", "no"}, {"1", "yes"}}));
  EXPECT_EQ(config["label2id"], (json{{"no", 0}, {"yes", 1}}));

  const HeadConfig two{HeadType::classification, 2};
  EXPECT_EQ(json::parse(model_config_with_head(config.dump(), two, {}))["id2label"]["1"], "yes");
  const json three =
      json::parse(model_config_with_head(config.dump(), {HeadType::classification, 3}, {}));
  EXPECT_EQ(three["id2label"]["2"], "LABEL_2");
  EXPECT_EQ(three["label2id"].size(), 3u);
  const json span = json::parse(model_config_with_head(config.dump(), {HeadType::span, 2}, {}));
  EXPECT_EQ(span["architectures"][0], "BertForQuestionAnswering");
  EXPECT_FALSE(span.contains("problem_type"));
  const json regression =
      json::parse(model_config_with_head(config.dump(), {HeadType::regression, 1}, {}));
  EXPECT_EQ(regression["problem_type"], "regression");
  EXPECT_THROW(model_config_with_head(kTinyConfig, two, {"a"}), ConfigError);
  EXPECT_THROW(model_config_with_head(kTinyConfig, two, {"a", "a"}), ConfigError);
}

}  // namespace
}  // namespace bitfall
