#include "engine/config.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tests/support/parse.h"

namespace bitfall {
namespace {

using test::by_default;
using test::error_of;
using test::parse;
using test::typed;
using ::testing::AllOf;
using ::testing::Contains;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

// As printed in the MoQ tutorial, trailing comma and all.
constexpr const char* kTutorial = R"({
"optimizer": {
"type": "AdamW",
"params": {
"lr": 2e-5,
"weight_decay": 0.0,
"bias_correction": true
}
},
"gradient_clipping": 1.0,
"fp16": {
"initial_scale_power": 16,
"enabled": true
},
"quantize_training": {
"enabled": true,
"quantize_verbose": true,
"quantizer_kernel": true,
"quantize-algo": {
"q_type": "symmetric"
},
"quantize_bits": {
"start_bits": 16,
"target_bits": 8
},
"quantize_schedule": {
"quantize_period": 400,
"schedule_offset": 0
},
"quantize_groups": 8,
}
})";

TEST(Config, TutorialFileWithTheTutorialCommand) {
  const FlagValues flags = {
      {"train_micro_batch_size_per_gpu", typed("--per_device_train_batch_size", "32")},
      {"optimizer.params.lr", typed("--learning_rate", "2e-05")},
      {"gradient_clipping", by_default("--max_grad_norm", "1.0")},
      {"fp16.enabled", typed("--fp16", "true")},
      {"seed", by_default("--seed", "42")},
      {"bitfall.warmup_steps", typed("--warmup_steps", "2")},
      {"bitfall.num_training_steps", by_default("--num_train_epochs", "345")},
      {"bitfall.lr_scheduler_type", by_default("--lr_scheduler_type", "\"linear\"")},
  };
  const CompletedConfig completed = parse(kTutorial, flags);
  const Config& config = completed.config;
  EXPECT_EQ(config.train_batch_size, 32);
  EXPECT_EQ(config.gradient_accumulation_steps, 1);
  EXPECT_EQ(config.optimizer.lr, 2e-5);
  EXPECT_EQ(config.gradient_clipping, 1.0);
  EXPECT_EQ(config.compute_dtype, DType::f16);
  EXPECT_TRUE(config.loss_scale.dynamic);
  EXPECT_EQ(config.loss_scale.initial_scale, 65536);
  EXPECT_EQ(config.scheduler.type, "linear");
  EXPECT_EQ(config.scheduler.params.at("num_warmup_steps"), 2);
  EXPECT_EQ(config.scheduler.params.at("num_training_steps"), 345);
  ASSERT_EQ(config.quantize.groups.size(), 1u);
  EXPECT_TRUE(config.quantize.enabled);
  EXPECT_TRUE(config.quantize.verbose);
  EXPECT_EQ(config.quantize.groups[0].start_bits, 16);
  EXPECT_EQ(config.quantize.groups[0].target_bits, 8);
  EXPECT_EQ(config.quantize.groups[0].quantize_period, 400);
  EXPECT_EQ(config.quantize.schedule_offset, 0);
  EXPECT_EQ(config.quantize.quantize_groups, 8);
  EXPECT_EQ(config.quantize.clock, ScheduleClock::step);
  EXPECT_EQ(completed.origins.at("optimizer.params.lr"), "file");
  EXPECT_EQ(completed.origins.at("train_micro_batch_size_per_gpu"),
            "flag --per_device_train_batch_size");
  EXPECT_EQ(completed.origins.at("train_batch_size"), "computed");
  EXPECT_EQ(completed.origins.at("optimizer.params.eps"), "default");
  EXPECT_THAT(completed.warnings,
              Contains(AllOf(HasSubstr("quantize-algo"), HasSubstr("quantize_algo"))));
}

TEST(Config, CompletedFileMeansTheSameAgain) {
  const CompletedConfig once =
      parse(kTutorial, {{"bitfall.num_training_steps", by_default("--num_train_epochs", "345")}});
  const CompletedConfig twice = parse(once.json);
  EXPECT_EQ(once.json, twice.json);
  EXPECT_EQ(twice.config.scheduler.params.at("num_training_steps"), 345);
}

TEST(Config, BatchTriangle) {
  const FlagValues two_ranks = {
      {"bitfall.world_size", typed("--world_size", "2")},
      {"train_micro_batch_size_per_gpu", by_default("--per_device_train_batch_size", "8")}};
  const auto sizes = [](const Config& config) {
    return std::array{config.train_batch_size, config.train_micro_batch_size_per_gpu,
                      config.gradient_accumulation_steps};
  };
  using Sizes = std::array<std::int64_t, 3>;
  EXPECT_EQ(sizes(parse("{}", two_ranks).config), (Sizes{16, 8, 1}));
  EXPECT_EQ(sizes(parse(R"({"train_batch_size": 32})", two_ranks).config), (Sizes{32, 16, 1}));
  EXPECT_EQ(
      sizes(parse(R"({"train_batch_size": 32, "train_micro_batch_size_per_gpu": 4})", two_ranks)
                .config),
      (Sizes{32, 4, 4}));
  EXPECT_EQ(
      sizes(
          parse(R"({"train_batch_size": 32, "gradient_accumulation_steps": 2})", two_ranks).config),
      (Sizes{32, 8, 2}));
  EXPECT_EQ(sizes(parse(R"({"train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto",
                           "gradient_accumulation_steps": 3})",
                        two_ranks)
                      .config),
            (Sizes{48, 8, 3}));
  EXPECT_EQ(sizes(parse("{}").config), (Sizes{8, 8, 1}));
  EXPECT_THAT(error_of(R"({"train_batch_size": 33})", two_ranks), HasSubstr("a multiple of"));
  EXPECT_THAT(error_of(R"({"train_batch_size": 32, "train_micro_batch_size_per_gpu": 4,
                           "gradient_accumulation_steps": 2})",
                       two_ranks),
              HasSubstr("16 = train_micro_batch_size_per_gpu (4) x"));
  EXPECT_THAT(error_of(R"({"train_batch_size": 0})"), HasSubstr("at least"));
  EXPECT_THAT(error_of(R"({"train_batch_size": 99999999999999999999})"), HasSubstr("an integer"));
}

TEST(Config, GivenFlagsMustAgreeAndDefaultsOnlyFill) {
  const std::string file = R"({"optimizer": {"type": "AdamW", "params": {"lr": 2e-5}}})";
  EXPECT_THAT(
      error_of(file, {{"optimizer.params.lr", typed("--learning_rate", "3e-05")}}),
      AllOf(HasSubstr("optimizer.params.lr = 2e-05"), HasSubstr("--learning_rate is 3e-05")));
  EXPECT_EQ(parse(file, {{"optimizer.params.lr", by_default("--learning_rate", "5e-05")}})
                .config.optimizer.lr,
            2e-5);
  // A key that the file's section leaves out keeps DeepSpeed's default unless the flag was typed.
  const std::string decay = "optimizer.params.weight_decay";
  EXPECT_EQ(
      parse(file, {{decay, by_default("--weight_decay", "0.1")}}).config.optimizer.weight_decay,
      0.0);
  EXPECT_EQ(parse(file, {{decay, typed("--weight_decay", "0.1")}}).config.optimizer.weight_decay,
            0.1);
  // Without the section, Hugging Face builds the optimizer from the flags.
  EXPECT_EQ(
      parse("{}", {{decay, by_default("--weight_decay", "0.1")}}).config.optimizer.weight_decay,
      0.1);
  const std::string automatic =
      R"({"optimizer": {"type": "Adam", "params": {"lr": "auto", "betas": "auto"}}})";
  const CompletedConfig filled =
      parse(automatic, {{"optimizer.params.lr", by_default("--learning_rate", "5e-05")},
                        {"optimizer.params.betas", by_default("--adam_beta1", "[0.8, 0.99]")}});
  EXPECT_EQ(filled.config.optimizer.lr, 5e-5);
  EXPECT_THAT(filled.config.optimizer.betas, ElementsAre(0.8, 0.99));
  EXPECT_EQ(filled.origins.at("optimizer.params.lr"), "flag --learning_rate");
  EXPECT_THAT(error_of(automatic), HasSubstr("no command-line flag fills this key"));
  // As in DeepSpeed, a file without gradient_clipping does not clip; without a file the flag does.
  const FlagValues clipping = {{"gradient_clipping", by_default("--max_grad_norm", "1.0")}};
  EXPECT_EQ(parse("{}", clipping).config.gradient_clipping, 0.0);
  EXPECT_EQ(parse("", clipping).config.gradient_clipping, 1.0);
}

TEST(Config, Precision) {
  EXPECT_EQ(parse("{}").config.compute_dtype, DType::f32);
  EXPECT_EQ(parse(R"({"bf16": {"enabled": true}})").config.compute_dtype, DType::bf16);
  EXPECT_EQ(parse("{}", {{"bf16.enabled", typed("--bf16", "true")}}).config.compute_dtype,
            DType::bf16);
  EXPECT_THAT(error_of(R"({"fp16": {"enabled": true}, "bf16": {"enabled": true}})"),
              HasSubstr("choose one"));
  EXPECT_THAT(
      error_of(R"({"fp16": {"enabled": true}})", {{"bf16.enabled", typed("--bf16", "true")}}),
      HasSubstr("choose one"));
  const LossScaleConfig fixed =
      parse(R"({"fp16": {"enabled": true, "loss_scale": 128}})").config.loss_scale;
  EXPECT_FALSE(fixed.dynamic);
  EXPECT_EQ(fixed.initial_scale, 128);
  EXPECT_EQ(parse(R"({"bf16": {"enabled": true}})").config.loss_scale.initial_scale, 1.0);
  EXPECT_THAT(error_of(R"({"fp16": {"enabled": true, "hysteresis": 0}})"), HasSubstr("hysteresis"));
  EXPECT_THAT(error_of(R"({"fp16": {"enabled": 1}})"), HasSubstr("true or false"));
}

TEST(Config, OptimizerRefusals) {
  const auto params = [](const std::string& inner) {
    return error_of(R"({"optimizer": {"type": "AdamW", "params": {)" + inner + "}}}");
  };
  EXPECT_THAT(params(R"("lr": -1)"), HasSubstr("at least 0"));
  EXPECT_THAT(params(R"("lr": "fast")"), HasSubstr("a number"));
  EXPECT_THAT(params(R"("betas": [0.9, 1.0])"), HasSubstr("two numbers"));
  EXPECT_THAT(params(R"("betas": 0.9)"), HasSubstr("two numbers"));
  EXPECT_THAT(params(R"("adam_w_mode": false)"), HasSubstr("type \"Adam\""));
  EXPECT_THAT(params(R"("max_grad_norm": 1.0)"), HasSubstr("gradient_clipping"));
  EXPECT_THAT(params(R"("amsgrad": true)"), HasSubstr("not supported"));
  EXPECT_THAT(params(R"("weight_decya": 0.1)"),
              HasSubstr("did you mean \"optimizer.params.weight_decay\""));
  EXPECT_THAT(error_of(R"({"optimizer": {"type": "Lamb"}})"), HasSubstr("\"Adam\" or \"AdamW\""));
  EXPECT_THAT(error_of(R"({"optimizer": []})"), HasSubstr("expected an object"));
}

TEST(Config, Schedulers) {
  const SchedulerConfig warmup =
      parse(R"({"scheduler": {"type": "WarmupDecayLR", "params":
      {"total_num_steps": "auto", "warmup_max_lr": "auto", "warmup_num_steps": "auto"}}})",
            {{"optimizer.params.lr", by_default("--learning_rate", "5e-05")},
             {"bitfall.warmup_steps", by_default("--warmup_steps", "10")},
             {"bitfall.num_training_steps", by_default("--num_train_epochs", "345")}})
          .config.scheduler;
  EXPECT_EQ(warmup.params.at("total_num_steps"), 345);
  EXPECT_EQ(warmup.params.at("warmup_max_lr"), 5e-5);
  EXPECT_EQ(warmup.params.at("warmup_num_steps"), 10);
  EXPECT_EQ(warmup.warmup_type, "log");
  EXPECT_THAT(parse(R"({"scheduler": {"type": "WarmupLR"}})").warnings,
              Contains(HasSubstr("DeepSpeed's default 0.001")));
  const auto one_cycle = [](const std::string& inner) {
    return error_of(R"({"scheduler": {"type": "OneCycle", "params": {"cycle_min_lr": 1e-5)" +
                    inner + "}}}");
  };
  EXPECT_THAT(one_cycle(""), HasSubstr("cycle_max_lr: missing"));
  EXPECT_THAT(one_cycle(R"(, "cycle_max_lr": 1e-3)"), HasSubstr("cycle_momentum"));
  EXPECT_EQ(one_cycle(R"(, "cycle_max_lr": 1e-3, "cycle_momentum": false)"), "no error");
  EXPECT_THAT(error_of(R"({"scheduler": {"type": "WarmupLr"}})"),
              HasSubstr("did you mean \"WarmupLR\""));
  EXPECT_THAT(error_of(R"({"scheduler": {"type": "WarmupLR"}})",
                       {{"bitfall.lr_scheduler_type", typed("--lr_scheduler_type", "\"cosine\"")}}),
              HasSubstr("--lr_scheduler_type \"cosine\""));
  EXPECT_THAT(error_of("{}", {{"bitfall.lr_scheduler_type",
                               typed("--lr_scheduler_type", "\"reduce_lr_on_plateau\"")}}),
              HasSubstr("(from --lr_scheduler_type)"));
}

TEST(Config, ZeroOptimization) {
  const auto stage_of = [](const std::string& zero) {
    return parse(R"({"zero_optimization": )" + zero + "}").config.zero_stage;
  };
  EXPECT_EQ(parse("{}").config.zero_stage, 0);
  for (const int stage : {0, 1, 2}) EXPECT_EQ(stage_of(concat(R"({"stage": )", stage, "}")), stage);
  EXPECT_EQ(stage_of("true"), 1);
  EXPECT_EQ(stage_of("false"), 0);
  EXPECT_THAT(parse(R"({"zero_optimization": true})").json, HasSubstr(R"("stage": 1)"));
  EXPECT_EQ(stage_of(R"({"stage": 2, "offload_optimizer": {"device": "none"}})"), 2);

  const CompletedConfig tuned = parse(R"({"zero_optimization": {"stage": 2, "overlap_comm": true,
      "reduce_bucket_size": "auto", "allgather_bucket_size": 5e8, "contiguous_gradients": true,
      "round_robin_gradients": true, "stage3_max_live_parameters": 1e9}})");
  for (const char* key : {"overlap_comm", "reduce_bucket_size", "allgather_bucket_size",
                          "contiguous_gradients", "round_robin_gradients"}) {
    EXPECT_THAT(tuned.warnings,
                Contains(HasSubstr(concat("zero_optimization.", key, ": ignored"))));
  }

  const auto refusal = [](const std::string& zero) {
    return error_of(R"({"zero_optimization": )" + zero + "}");
  };
  EXPECT_THAT(refusal(R"({"stage": 3})"), HasSubstr("stage 3 (partitioned weights)"));
  EXPECT_THAT(refusal(R"({"stage": 4})"), HasSubstr("zero_optimization.stage = 4"));
  EXPECT_THAT(refusal(R"({"stage": "auto"})"), HasSubstr("no command-line flag fills"));
  EXPECT_THAT(refusal(R"({"stage": 2, "offload_optimizer": {"device": "cpu"}})"),
              HasSubstr("offloading is not supported"));
  EXPECT_THAT(refusal(R"({"offload_param": {"device": "nvme"}})"), HasSubstr("offload_param"));
  EXPECT_THAT(refusal(R"({"cpu_offload": true})"), HasSubstr("not supported"));
  EXPECT_THAT(refusal(R"({"stagee": 1})"), HasSubstr("did you mean"));
  EXPECT_THAT(refusal("1"), HasSubstr("expected an object"));
}

TEST(Config, OtherSections) {
  EXPECT_THAT(error_of(R"({"prescale_gradients": true})"), HasSubstr("not supported"));
  EXPECT_EQ(error_of(R"({"prescale_gradients": false, "gradient_predivide_factor": 1.0})"),
            "no error");
  EXPECT_THAT(parse(R"({"zero_allow_untested_optimizer": true})").warnings,
              Contains(HasSubstr("zero_allow_untested_optimizer: ignored")));
  EXPECT_EQ(parse(R"({"steps_per_print": 5})").config.steps_per_print, 5);
}

TEST(Config, SyntaxErrorsNameLineAndColumn) {
  EXPECT_THAT(error_of("{\n  \"seed\": 1,,\n}"), HasSubstr("test.json:2:13: JSON syntax error"));
  EXPECT_THAT(error_of("{\n\"seed\": NaN}"), AllOf(HasSubstr("test.json:2:"), HasSubstr("NaN")));
  EXPECT_THAT(error_of("{\"gradient_clipping\": -Infinity}"), HasSubstr("test.json:1:"));
  EXPECT_THAT(error_of("{\n\"gradient_clipping\": 1e999}"),
              HasSubstr("test.json:2:22: the number 1e999"));
  EXPECT_THAT(error_of("{\"seed\": 1} /* open"), HasSubstr("never closed"));
  EXPECT_THAT(error_of("{\"seed"), HasSubstr("test.json:1:2: this string is never closed"));
  EXPECT_THAT(error_of("[1]"), HasSubstr("expected an object"));
  EXPECT_THAT(error_of("{\"seed\": [,]}"), HasSubstr("syntax error"));
  EXPECT_THAT(error_of(std::string(100, '[')), HasSubstr("nested deeper"));
  EXPECT_THAT(error_of("{\"\xff\": 1}"), HasSubstr("syntax error"));
}

TEST(Config, DuplicateAndUnknownKeysNameTheirLines) {
  EXPECT_THAT(error_of("{\n\"seed\": 1,\n\"\\u0073eed\": 2}"),
              AllOf(HasSubstr("test.json:3:1: seed: this key occurs twice"), HasSubstr("line 2")));
  EXPECT_THAT(error_of("{\n\n\"gradient_cliping\": 1}"),
              AllOf(HasSubstr("test.json:3: gradient_cliping: unknown key"),
                    HasSubstr("did you mean \"gradient_clipping\"")));
}

TEST(Config, CommentsAndTrailingCommas) {
  const Config config = parse(
                            "// top\n{\"seed\": 7, # seven\n /* \"seed\": 8, */ "
                            "\"steps_per_print\": 3, // http://x\n}\n")
                            .config;
  EXPECT_EQ(config.seed, 7u);
  EXPECT_EQ(config.steps_per_print, 3);
}

TEST(Config, FlagsMustBeJson) {
  EXPECT_THAT(error_of("{}", {{"seed", typed("--seed", "forty")}}), HasSubstr("--seed: 'forty'"));
  EXPECT_THAT(error_of("{}", {{"seed", typed("--seed", "-1")}}), HasSubstr("(from --seed)"));
}

TEST(Config, OwnSectionIsInTheCompletedConfig) {
  EXPECT_THAT(parse("{}").json, HasSubstr("\"native_encoder\": true"));
  EXPECT_THAT(parse(R"({"bitfall": {"native_encoder": false}})").json,
              HasSubstr("\"native_encoder\": false"));
  EXPECT_THAT(error_of(R"({"bitfall": {"native_encodr": false}})"),
              AllOf(HasSubstr("bitfall.native_encodr"), HasSubstr("native_encoder")));
}

}  // namespace
}  // namespace bitfall
