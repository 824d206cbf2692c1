#include "engine/encoder_config.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "core/error.h"

namespace bitfall {
namespace {

using ::testing::HasSubstr;

std::string refusal(const std::string& text) {
  try {
    parse_encoder_config(text, "config.json");
  } catch (const ModelFileError& error) {
    return error.what();
  }
  return "";
}

TEST(EncoderConfig, ReadsEveryKey) {
  const EncoderConfig config = parse_encoder_config(
      R"({"model_type": "bert", "vocab_size": 100, "hidden_size": 24, "num_hidden_layers": 3,
          "num_attention_heads": 2, "intermediate_size": 50, "max_position_embeddings": 40,
          "type_vocab_size": 1, "hidden_act": "gelu_new", "hidden_dropout_prob": 0.2,
          "attention_probs_dropout_prob": 0, "classifier_dropout": 0.3, "layer_norm_eps": 1e-5,
          "initializer_range": 0.1, "position_embedding_type": "absolute", "is_decoder": false})",
      "config.json");
  EXPECT_EQ(config.vocab_size, 100);
  EXPECT_EQ(config.hidden_size, 24);
  EXPECT_EQ(config.num_hidden_layers, 3);
  EXPECT_EQ(config.num_attention_heads, 2);
  EXPECT_EQ(config.head_size(), 12);
  EXPECT_EQ(config.intermediate_size, 50);
  EXPECT_EQ(config.max_position_embeddings, 40);
  EXPECT_EQ(config.type_vocab_size, 1);
  EXPECT_EQ(config.hidden_act, Activation::gelu_tanh);
  EXPECT_EQ(config.hidden_dropout_prob, 0.2f);
  EXPECT_EQ(config.attention_probs_dropout_prob, 0.0f);
  EXPECT_EQ(config.classifier_dropout, 0.3f);
  EXPECT_EQ(config.layer_norm_eps, 1e-5f);
  EXPECT_EQ(config.initializer_range, 0.1f);
}

TEST(EncoderConfig, DefaultsAreThoseOfTransformers) {
  const EncoderConfig config = parse_encoder_config(
      R"({"model_type": "bert", "hidden_dropout_prob": 0.25, "classifier_dropout": null})", "c");
  EXPECT_EQ(config.vocab_size, 30522);
  EXPECT_EQ(config.hidden_size, 768);
  EXPECT_EQ(config.num_hidden_layers, 12);
  EXPECT_EQ(config.hidden_act, Activation::gelu);
  EXPECT_EQ(config.classifier_dropout, 0.25f);
}

TEST(EncoderConfig, RefusesWhatTheEncoderCannotRun) {
  const std::vector<std::pair<std::string, std::string>> cases{
      {R"("model_type": "roberta")", "model_type = \"roberta\": expected \"bert\""},
      {R"("hidden_size": 100)", "num_attention_heads"},
      {R"("num_attention_heads": 0)", "num_attention_heads = 0: expected an integer from 1"},
      {R"("hidden_size": 768.5)", "hidden_size = 768.5"},
      {R"("hidden_size": "768")", "hidden_size = \"768\""},
      {R"("vocab_size": 18446744073709551615)", "vocab_size = 18446744073709551615"},
      {R"("vocab_size": -1)", "vocab_size = -1"},
      {R"("max_position_embeddings": 100000)", "max_position_embeddings = 100000"},
      {R"("hidden_act": "silu")", "hidden_act = \"silu\": expected one of gelu, gelu_python"},
      {R"("hidden_dropout_prob": 1)", "hidden_dropout_prob = 1"},
      {R"("layer_norm_eps": "1e-12")", "layer_norm_eps"},
      {R"("position_embedding_type": "relative_key")",
       "position_embedding_type = \"relative_key\""},
      {R"("is_decoder": true)", "is_decoder = true: expected false"},
      {R"("add_cross_attention": true)", "add_cross_attention"}};
  for (const auto& [entry, expected] : cases) {
    const bool has_type = entry.find("model_type") != std::string::npos;
    const std::string message =
        refusal(concat("{", has_type ? "" : "\"model_type\": \"bert\", ", entry, "}"));
    EXPECT_THAT(message, HasSubstr(expected)) << entry;
    EXPECT_THAT(message, HasSubstr("config.json")) << entry;
  }
  EXPECT_THAT(refusal("{}"), HasSubstr("model_type = null"));
  EXPECT_THAT(refusal("[]"), HasSubstr("not a JSON object"));
  EXPECT_THAT(refusal("{\"model_type\""), HasSubstr("not valid JSON"));
}

}  // namespace
}  // namespace bitfall
