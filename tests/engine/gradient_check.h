// Gradients of a whole model against differences of its loss.
#pragma once

#include <gtest/gtest.h>

#include <vector>

#include "tests/engine/golden_case.h"

namespace bitfall {

struct GradientTolerance {
  double absolute = 0;
  double negligible = 0;  ///< parameters with a smaller gradient (the key bias) are left out
};

/// Each parameter of `model` along its steepest direction. Case: store, gradients(context),
/// loss(context), publish() after a change of the masters.
template <typename Case>
void expect_gradients_match_differences(Case& model, const ForwardContext& context,
                                        const GradientTolerance& tolerance) {
  model.gradients(context);
  float* const master = model.store.master().template as<float>();
  const std::vector<float> start(master, master + model.store.numel());
  for (std::size_t i = 0; i < model.store.parameters().size(); ++i) {
    const Parameter& parameter = model.store.parameters()[i];
    const std::vector<float> gradient = to_floats(model.store.gradient(i));
    const double slope = norm(gradient);
    if (slope < tolerance.negligible) continue;
    const double step = 2e-3;
    const auto loss_at = [&](double length) {
      for (std::size_t j = 0; j < gradient.size(); ++j) {
        const std::size_t index = static_cast<std::size_t>(parameter.offset) + j;
        master[index] = start[index] + static_cast<float>(length * gradient[j] / slope);
      }
      model.publish();
      return model.loss(context);
    };
    const double difference = (loss_at(step) - loss_at(-step)) / (2 * step);
    loss_at(0);
    EXPECT_NEAR(difference, slope, 0.01 * slope + tolerance.absolute) << parameter.name;
  }
}

}  // namespace bitfall
