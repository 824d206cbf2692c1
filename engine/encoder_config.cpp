#include "engine/encoder_config.h"

#include <array>
#include <nlohmann/json.hpp>
#include <string_view>

#include "core/error.h"

namespace bitfall {
namespace {

using nlohmann::json;

constexpr std::int64_t kMaxSize = std::int64_t{1} << 30;
constexpr std::int64_t kMaxPositions = 65536;  // dropout keys hold a query position in 16 bits

struct NamedActivation {
  std::string_view name;
  Activation activation;
};
/// The names of transformers.activations.ACT2FN for the functions that the backends have.
constexpr std::array<NamedActivation, 9> kActivations{{
    {"gelu", Activation::gelu},
    {"gelu_python", Activation::gelu},
    {"gelu_new", Activation::gelu_tanh},
    {"gelu_fast", Activation::gelu_tanh},
    {"gelu_accurate", Activation::gelu_tanh},
    {"gelu_pytorch_tanh", Activation::gelu_tanh},
    {"gelu_python_tanh", Activation::gelu_tanh},
    {"relu", Activation::relu},
    {"tanh", Activation::tanh},
}};

/// Reads keys of one config.json; every complaint names file and key.
class ConfigReader {
 public:
  ConfigReader(const json& object, const std::string& source) : object_(object), source_(source) {}

  std::int64_t size(const char* key, std::int64_t fallback, std::int64_t maximum = kMaxSize) const {
    const json* const value = find(key);
    if (value == nullptr) return fallback;
    // Far larger numbers than int64 are "floating" or "unsigned" to the JSON library.
    const bool fits = value->is_number_integer() && *value >= 1 && *value <= maximum;
    expect(fits, key, "an integer from 1 to ", maximum);
    return value->get<std::int64_t>();
  }

  float number(const char* key, float fallback, double minimum, double below) const {
    const json* const value = find(key);
    if (value == nullptr) return fallback;
    const bool fits =
        value->is_number() && value->get<double>() >= minimum && value->get<double>() < below;
    expect(fits, key, "a number from ", minimum, " to below ", below);
    return value->get<float>();
  }

  Activation activation(const char* key, Activation fallback) const {
    const json* const value = find(key);
    if (value == nullptr) return fallback;
    std::string names;
    for (const NamedActivation& known : kActivations) {
      if (*value == known.name) return known.activation;
      names += concat(names.empty() ? "" : ", ", known.name);
    }
    expect(false, key, "one of ", names);
    return fallback;
  }

  /// The encoder has only one variant of what `key` chooses: `expected`, or no such key.
  void require(const char* key, const json& expected) const {
    const json* const value = find(key);
    expect(value == nullptr || *value == expected, key, expected.dump(),
           "; the encoder has no other variant");
  }

  template <typename... Parts>
  void expect(bool condition, const char* key, const Parts&... expected) const {
    if (condition) return;
    throw ModelFileError(concat(source_, ": ", key, " = ", object_.value(key, json()).dump(),
                                ": expected ", expected...));
  }

 private:
  /// Null for an absent key and for JSON null, which transformers writes for "default".
  const json* find(const char* key) const {
    const auto found = object_.find(key);
    return found == object_.end() || found->is_null() ? nullptr : &*found;
  }

  const json& object_;
  const std::string& source_;
};

json parse_object(const std::string& text, const std::string& source) {
  try {
    json object = json::parse(text);
    check<ModelFileError>(object.is_object(), source, ": the file is not a JSON object");
    return object;
  } catch (const json::exception& error) {
    throw ModelFileError(concat(source, ": not valid JSON: ", error.what()));
  }
}

void require_plain_bert(const ConfigReader& reader, const json& object) {
  reader.expect(object.contains("model_type"), "model_type", "\"bert\"");
  reader.require("model_type", "bert");
  reader.require("position_embedding_type", "absolute");
  reader.require("is_decoder", false);
  reader.require("add_cross_attention", false);
  reader.require("is_encoder_decoder", false);
}

}  // namespace

EncoderConfig parse_encoder_config(const std::string& text, const std::string& source) {
  const json object = parse_object(text, source);
  const ConfigReader reader(object, source);
  require_plain_bert(reader, object);

  EncoderConfig config;
  config.vocab_size = reader.size("vocab_size", config.vocab_size);
  config.hidden_size = reader.size("hidden_size", config.hidden_size);
  config.num_hidden_layers = reader.size("num_hidden_layers", config.num_hidden_layers);
  config.num_attention_heads = reader.size("num_attention_heads", config.num_attention_heads);
  config.intermediate_size = reader.size("intermediate_size", config.intermediate_size);
  config.max_position_embeddings =
      reader.size("max_position_embeddings", config.max_position_embeddings, kMaxPositions);
  config.type_vocab_size = reader.size("type_vocab_size", config.type_vocab_size);
  config.hidden_act = reader.activation("hidden_act", config.hidden_act);
  config.hidden_dropout_prob = reader.number("hidden_dropout_prob", 0.1f, 0, 1);
  config.attention_probs_dropout_prob = reader.number("attention_probs_dropout_prob", 0.1f, 0, 1);
  config.classifier_dropout = reader.number("classifier_dropout", config.hidden_dropout_prob, 0, 1);
  config.layer_norm_eps = reader.number("layer_norm_eps", config.layer_norm_eps, 0, 1);
  config.initializer_range = reader.number("initializer_range", config.initializer_range, 0, 10);
  reader.expect(config.hidden_size % config.num_attention_heads == 0, "num_attention_heads",
                "a divisor of hidden_size = ", config.hidden_size);
  return config;
}

}  // namespace bitfall
