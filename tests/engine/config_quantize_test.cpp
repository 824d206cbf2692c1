#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tests/support/parse.h"

namespace bitfall {
namespace {

using test::error_of;
using test::parse;
using ::testing::Contains;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

/// The error of a file {"quantize_training": {"enabled": true, <inner>}}.
std::string quantize_error(const std::string& inner) {
  return error_of(R"({"quantize_training": {"enabled": true, )" + inner + "}}");
}

TEST(ConfigQuantize, DefaultsOfTheTutorialText) {
  const QuantizeConfig quantize =
      parse(R"({"quantize_training": {"enabled": true}})").config.quantize;
  EXPECT_EQ(quantize.groups[0].start_bits, 16);
  EXPECT_EQ(quantize.groups[0].target_bits, 16);
  EXPECT_EQ(quantize.groups[0].quantize_period, 100);
  EXPECT_EQ(quantize.schedule_offset, 100);
  EXPECT_EQ(quantize.quantize_groups, 1);
  EXPECT_EQ(quantize.change_ratio, 0.001);
  EXPECT_THAT(parse(R"({"quantize_training": {"enabled": true}})").warnings,
              Contains(HasSubstr("no weight is ever quantized")));
  EXPECT_THAT(parse(R"({"quantize_training": {"quantize_bits": {"target_bits": 8}}})").warnings,
              Contains(HasSubstr("quantization is off")));
}

TEST(ConfigQuantize, EigenvalueNestedOrAtTheTop) {
  const std::string bits = R"("quantize_bits": {"start_bits": 12, "target_bits": 8})";
  const std::string eigenvalue =
      R"("eigenvalue": {"enabled": true, "max_iter": 50, "stability": 0, "layer_num": 12})";
  for (const std::string& text :
       {R"({"quantize_training": {"enabled": true, )" + bits + ", " + eigenvalue + "}}",
        R"({"quantize_training": {"enabled": true, )" + bits + "}, " + eigenvalue + "}"}) {
    const EigenvalueConfig parsed = parse(text).config.eigenvalue;
    EXPECT_TRUE(parsed.enabled) << text;
    EXPECT_EQ(parsed.max_iter, 50);
    EXPECT_EQ(parsed.tol, 1e-2);
    EXPECT_EQ(parsed.stability, 0);
    EXPECT_EQ(parsed.layer_name, "bert.encoder.layer");
    EXPECT_EQ(parsed.layer_num, 12);
  }
  EXPECT_THAT(error_of(R"({"quantize_training": {"enabled": true, )" + eigenvalue + "}, " +
                       eigenvalue + "}"),
              HasSubstr("keep one of the two"));
  const CompletedConfig off = parse("{" + eigenvalue + "}");
  EXPECT_FALSE(off.config.eigenvalue.enabled);
  EXPECT_THAT(off.warnings, Contains(HasSubstr("quantization is not enabled")));
}

TEST(ConfigQuantize, CompressionTrainingThroughTheKeyMap) {
  const CompletedConfig completed = parse(R"({"compression_training": {
    "weight_quantization": {
      "shared_parameters": {
        "enabled": true, "schedule_offset": 5, "quantize_groups": 4, "quantize_verbose": true,
        "quantization_type": "asymmetric", "rounding": "stochastic",
        "quantize_weight_in_forward": false,
        "fp16_mixed_quantize": {"enabled": true, "quantize_change_ratio": 0.01}},
      "different_groups": {
        "wq1": {"params": {"start_bits": 12, "target_bits": 8, "quantization_period": 50},
                "modules": ["attention.self", "intermediate"], "related_modules": null},
        "wq2": {"params": {"start_bits": 8, "target_bits": 4, "quantization_period": 10},
                "modules": ["*"]}}},
    "activation_quantization": {"shared_parameters": {"enabled": false}, "different_groups": {}},
    "layer_reduction": {"enabled": false}}})");
  const QuantizeConfig& quantize = completed.config.quantize;
  EXPECT_TRUE(quantize.enabled);
  EXPECT_EQ(quantize.schedule_offset, 5);
  EXPECT_EQ(quantize.quantize_groups, 4);
  EXPECT_EQ(quantize.q_type, QuantType::asymmetric);
  EXPECT_EQ(quantize.rounding, Rounding::stochastic);
  EXPECT_TRUE(quantize.mixed_enabled);
  EXPECT_EQ(quantize.change_ratio, 0.01);
  ASSERT_EQ(quantize.groups.size(), 2u);
  EXPECT_EQ(quantize.groups[0].name, "wq1");
  EXPECT_EQ(quantize.groups[0].quantize_period, 50);
  EXPECT_THAT(quantize.groups[0].modules, ElementsAre("attention.self", "intermediate"));
  EXPECT_EQ(quantize.groups[1].target_bits, 4);
  EXPECT_THAT(quantize.groups[1].modules, IsEmpty());
}

TEST(ConfigQuantize, CompressionTrainingRefusals) {
  const auto weights = [](const std::string& shared, const std::string& groups) {
    return R"({"compression_training": {"weight_quantization": {"shared_parameters": {)" + shared +
           R"(}, "different_groups": {)" + groups + "}}}}";
  };
  const std::string group = R"("a": {"params": {"start_bits": 8, "target_bits": 4}})";
  EXPECT_THAT(error_of(weights(R"("enabled": true, "quantize_weight_in_forward": true)", group)),
              HasSubstr("not supported"));
  EXPECT_THAT(error_of(weights(R"("enabled": true)", "")), HasSubstr("different_groups"));
  EXPECT_THAT(error_of(weights(R"("enabled": true)", R"("a": {"params": {"start_bits": 8}})")),
              HasSubstr("different_groups.a.params.target_bits: missing"));
  EXPECT_THAT(error_of(weights(R"("enabled": true)",
                               R"("a": {"params": {"start_bits": 8, "target_bits": 4},
                                  "modules": ["(query"]})")),
              HasSubstr("a regular expression"));
  EXPECT_THAT(error_of(R"({"compression_training": {"activation_quantization":
                           {"shared_parameters": {"enabled": true}}}})"),
              HasSubstr("not supported"));
  EXPECT_THAT(error_of(R"({"compression_training": {"layer_reduction": {"enabled": true}}})"),
              HasSubstr("not supported"));
  EXPECT_THAT(error_of(R"({"compression_training": {"weight_quantisation": {}}})"),
              HasSubstr("unknown key"));
}

TEST(ConfigQuantize, QuantizeRefusals) {
  EXPECT_THAT(quantize_error(R"("quantize_bits": {"target_bits": 0})"),
              HasSubstr("quantize_bits.target_bits = 0: expected an integer from 1 to 16"));
  EXPECT_THAT(quantize_error(R"("quantize_bits": {"target_bits": -1})"), HasSubstr("from 1 to 16"));
  EXPECT_THAT(quantize_error(R"("quantize_bits": {"start_bits": 17})"), HasSubstr("from 1 to 16"));
  EXPECT_THAT(quantize_error(R"("quantize_bits": {"start_bits": 4, "target_bits": 8})"),
              HasSubstr("at most start_bits (4)"));
  EXPECT_THAT(quantize_error(R"("quantize_bits": {"target_bits": 7.5})"), HasSubstr("an integer"));
  EXPECT_THAT(quantize_error(R"("quantize_bits": {"target_bits": "auto"})"),
              HasSubstr("no command-line flag fills this key"));
  EXPECT_THAT(quantize_error(R"("quantize_schedule": {"quantize_period": 0})"),
              HasSubstr("at least 1"));
  EXPECT_THAT(quantize_error(R"("quantize_schedule": {"schedule_offset": -1})"),
              HasSubstr("at least 0"));
  EXPECT_THAT(quantize_error(R"("quantize_schedule": {"clock": "deepspeed"})"),
              HasSubstr("did you mean \"deepspeed-0.6\""));
  EXPECT_THAT(quantize_error(R"("quantize_groups": 0)"), HasSubstr("at least 1"));
  EXPECT_THAT(quantize_error(R"("fp16_mixed_quantize": {"quantize_change_ratio": 0})"),
              HasSubstr("above 0 to 1"));
  EXPECT_THAT(quantize_error(R"("fp16_mixed_quantize": {"quantize_change_ratio": 1.5})"),
              HasSubstr("above 0 to 1"));
  EXPECT_THAT(quantize_error(R"("quantize_algo": {"q_type": "symetric"})"),
              HasSubstr("did you mean \"symmetric\""));
  EXPECT_THAT(
      quantize_error(R"("quantize_type": "asymmetric", "quantize_algo": {"q_type": "symmetric"})"),
      HasSubstr("the same as quantize_algo.q_type"));
  EXPECT_THAT(
      quantize_error(
          R"("quantize_bits": {"target_bits": 2}, "quantize_algo": {"rounding": "stochastic"})"),
      HasSubstr("ternary"));
  EXPECT_THAT(
      quantize_error(R"("quantize_bits": {"target_bits": 1}, "quantize_type": "asymmetric")"),
      HasSubstr("binary"));
  EXPECT_THAT(quantize_error(R"("quantize_perod": 4)"), HasSubstr("unknown key"));
  EXPECT_EQ(quantize_error(R"("quantize_bits": {"target_bits": 2})"), "no error");
}

}  // namespace
}  // namespace bitfall
