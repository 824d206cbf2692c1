// Model folders as Hugging Face writes them: config.json and model.safetensors (or its shards).
//
// The names of parameters inside bitfall are those of BertForSequenceClassification and
// BertForQuestionAnswering; files may come from BertModel or any BertFor... class.
#pragma once

#include <cstdint>
#include <filesystem>
#include <span>
#include <string>
#include <vector>

#include "core/backend.h"
#include "core/parameter_store.h"
#include "engine/encoder_config.h"
#include "engine/heads.h"

namespace bitfall {

/// The text of folder/config.json. Throws ModelFileError that says what the folder lacks.
std::string read_model_config(const std::filesystem::path& folder);

/// What a folder did not hold, and what of it was not needed.
struct LoadReport {
  std::vector<std::string> initialized;  ///< parameters of the head that got fresh values
  std::vector<std::string> ignored;      ///< tensors of the files that the model does not have
};

/// Fills the master weights of `store` from the weight files of `folder`; working is not touched.
///
/// Names may lack the prefix "bert." (BertModel) and norms may be called gamma and beta. F64, F16
/// and BF16 are converted. Head weights that no file has become N(0, initializer_range) by `seed`,
/// their biases 0. Throws ModelFileError for a folder without weights (and says how to convert a
/// pytorch_model.bin), a malformed file or index, missing encoder weights (all listed) and shapes
/// other than the model's (both shown).
LoadReport load_model_weights(const std::filesystem::path& folder, float initializer_range,
                              std::uint64_t seed, Backend& backend, const ParameterStore& store);

/// `config_json`, as read from a model folder, for a model with this head: all keys stay, while
/// architectures, problem_type, id2label and label2id describe the head and dtype the f32 weights.
///
/// `label_names` are its num_labels names, or none to keep those of `config_json` if they are as
/// many. Throws ConfigError for another number of names and for names that occur twice.
std::string model_config_with_head(const std::string& config_json, const HeadConfig& head,
                                   const std::vector<std::string>& label_names);

/// Writes folder/config.json and folder/model.safetensors so that transformers' from_pretrained
/// loads them; creates the folder. `weights` [per parameter] f32 are parallel to `parameters`.
///
/// Each file appears under its name only when complete. Throws ModelFileError (no permission, full
/// disk); older files of these names then stay.
void save_model(const std::filesystem::path& folder, const std::string& config_json,
                Backend& backend, const std::vector<Parameter>& parameters,
                std::span<const Tensor> weights);

}  // namespace bitfall
