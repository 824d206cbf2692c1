// The real MiniLM-L6 against PyTorch: tests/goldens/minilm.safetensors. The weights are too large
// for the repository; their folder is $BITFALL_MINILM_DIR.

#include <gtest/gtest.h>

#include <cstdlib>

#include "engine/model_files.h"
#include "tests/engine/golden_case.h"

namespace bitfall {
namespace {

TEST(MiniLm, LogitsLossAndEveryGradientMatchPyTorch) {
  const char* const folder = std::getenv("BITFALL_MINILM_DIR");
  if (folder == nullptr) GTEST_SKIP() << "BITFALL_MINILM_DIR names no folder of MiniLM-L6";
  const SafetensorsFile file(goldens_folder() / "minilm.safetensors");
  const EncoderConfig config = parse_encoder_config(read_model_config(folder), folder);
  CpuBackend backend;
  Encoder model(backend, config, {HeadType::classification, 3});
  ParameterStore store(backend, model.parameters(), DType::f32,
                       ParameterStore::WorkingCopy::shared);
  const LoadReport report = load_model_weights(folder, config.initializer_range, 1, backend, store);
  EXPECT_EQ(report.initialized, (std::vector<std::string>{"classifier.weight", "classifier.bias"}));
  for (const std::string& name : report.initialized) {
    const std::vector<float> values = read_floats(file, "weight." + name);
    const Tensor master = store.master(store.index_of(name));
    std::memcpy(master.data, values.data(), master.bytes());
  }
  model.bind(store.views(store.working()), store.views(store.gradient()));
  model.forward(golden_batch(file, HeadType::classification), {Mode::differentiate, 0, 0});
  model.backward(1.0f, Accumulate::no, {});

  const std::vector<float> logits = to_floats(model.logits());
  const std::vector<float> expected_logits = read_floats(file, "logits");
  for (std::size_t i = 0; i < expected_logits.size(); ++i) {
    EXPECT_NEAR(logits.at(i), expected_logits[i], 2e-5) << i;
  }
  EXPECT_NEAR(model.loss().as<float>()[0], read_floats(file, "loss")[0], 2e-5);
  for (std::size_t p = 0; p < store.parameters().size(); ++p) {
    const std::string& name = store.parameters()[p].name;
    const std::vector<float> gradient = to_floats(store.gradient(p));
    const float expected_norm = read_floats(file, "norm." + name)[0];
    EXPECT_NEAR(norm(gradient), expected_norm, 1e-4 * expected_norm + 1e-6) << name;
    std::vector<float> sampled;
    for (const std::int32_t index : read_integers(file, "index." + name)) {
      sampled.push_back(gradient.at(static_cast<std::size_t>(index)));
    }
    const std::vector<float> expected = read_floats(file, "gradient." + name);
    EXPECT_LT(distance(sampled, expected), 1e-4 * norm(expected) + 1e-6) << name;
  }
}

}  // namespace
}  // namespace bitfall
