#include "engine/loss_scaler.h"

#include <gtest/gtest.h>

#include "core/error.h"

namespace bitfall {
namespace {

LossScaleConfig dynamic(double initial_scale, std::int64_t window, int hysteresis) {
  LossScaleConfig config;
  config.dynamic = true;
  config.initial_scale = initial_scale;
  config.loss_scale_window = window;
  config.hysteresis = hysteresis;
  return config;
}

// Traces of DeepSpeed's DynamicLossScaler.update_scale, followed by hand.
TEST(LossScaler, HalvesAfterHysteresisIsUsedUp) {
  LossScaler scaler(dynamic(1024, 1000, 2));
  scaler.on_overflow();
  EXPECT_EQ(scaler.scale(), 1024);
  scaler.on_overflow();
  EXPECT_EQ(scaler.scale(), 512);
  scaler.on_success();  // hysteresis comes back only with a whole window
  scaler.on_overflow();
  EXPECT_EQ(scaler.scale(), 256);
}

TEST(LossScaler, ConsecutiveHysteresisComesBackAfterEachSuccess) {
  LossScaleConfig config = dynamic(1024, 1000, 2);
  config.consecutive_hysteresis = true;
  LossScaler scaler(config);
  for (int i = 0; i < 5; ++i) {
    scaler.on_overflow();
    scaler.on_success();
  }
  EXPECT_EQ(scaler.scale(), 1024);
}

TEST(LossScaler, DoublesOncePerWindowWithoutOverflow) {
  LossScaler scaler(dynamic(4, 3, 1));
  // iteration - last_overflow_iteration = 1, 2, 3: the third success completes the window.
  scaler.on_success();
  scaler.on_success();
  EXPECT_EQ(scaler.scale(), 4);
  scaler.on_success();
  EXPECT_EQ(scaler.scale(), 8);
  scaler.on_success();
  scaler.on_overflow();  // starts the window anew
  EXPECT_EQ(scaler.scale(), 4);
  scaler.on_success();
  scaler.on_success();
  EXPECT_EQ(scaler.scale(), 4);
  scaler.on_success();
  EXPECT_EQ(scaler.scale(), 8);
}

TEST(LossScaler, WindowRestoresHysteresis) {
  LossScaler scaler(dynamic(1024, 2, 2));
  scaler.on_overflow();
  scaler.on_success();
  scaler.on_success();
  EXPECT_EQ(scaler.scale(), 2048);
  scaler.on_overflow();
  EXPECT_EQ(scaler.scale(), 2048);
}

TEST(LossScaler, OverflowAtTheMinimumEndsTheTraining) {
  LossScaler scaler(dynamic(2, 1000, 1));
  scaler.on_overflow();
  EXPECT_EQ(scaler.scale(), 1);
  EXPECT_THROW(scaler.on_overflow(), TrainingError);
}

TEST(LossScaler, FixedScaleStays) {
  LossScaleConfig config;
  config.initial_scale = 128;
  LossScaler scaler(config);
  for (int i = 0; i < 3000; ++i) scaler.on_success();
  for (int i = 0; i < 10; ++i) scaler.on_overflow();
  EXPECT_EQ(scaler.scale(), 128);
}

TEST(LossScaler, RestoredScalerGoesOnLikeTheOriginal) {
  const LossScaleConfig config = dynamic(1024, 3, 2);
  LossScaler original(config), restored(config);
  original.on_overflow();
  original.on_success();
  restored.restore(original.state());
  for (int i = 0; i < 8; ++i) {
    i % 5 == 4 ? original.on_overflow() : original.on_success();
    i % 5 == 4 ? restored.on_overflow() : restored.on_success();
    EXPECT_EQ(restored.scale(), original.scale());
    EXPECT_EQ(restored.state().hysteresis, original.state().hysteresis);
  }
  LossScalerState broken = original.state();
  broken.scale = -1;
  EXPECT_THROW(restored.restore(broken), CheckpointError);
}

}  // namespace
}  // namespace bitfall
