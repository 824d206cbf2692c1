// What scripts/gpu_check.sh runs on a machine with a GPU, besides the tests of operations: losses
// beside the CPU's, repeated runs, two ranks, and speed. One JSON object per result on stdout.
//
// usage: gpu_check compare | smoke (compare in seconds) | ranks | speed
#include "tests/gpu/gpu_check.h"

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <iostream>
#include <string_view>

#include "core/error.h"
#include "engine/factory.h"

namespace bitfall::gpu_check {
namespace {

constexpr int kSmallVocab = 1000;

/// How much a comparison trains.
struct Sizes {
  EncoderConfig model;
  int steps, samples, longest;
};

std::vector<double> train(Engine& engine, const Sizes& sizes, int first_step) {
  std::vector<double> losses;
  for (int step = first_step; step < sizes.steps; ++step) {
    const Batch batch = random_batch(step, 0, sizes.samples, 5, sizes.longest, kSmallVocab);
    losses.push_back(engine.train_batch({&batch, 1}).loss);
  }
  return losses;
}

std::vector<double> losses(const Sizes& sizes, const std::string& precision,
                           const std::string& device) {
  SingleProcess alone;
  return train(*make(sizes.model, precision, kMoq, device, alone), sizes, 0);
}

double largest_difference(const std::vector<double>& a, const std::vector<double>& b,
                          std::size_t count) {
  double largest = a.size() == b.size() ? 0 : INFINITY;
  for (std::size_t i = 0; i < std::min(count, a.size()); ++i)
    largest = std::max(largest, std::fabs(a[i] - b[i]) / std::fabs(b[i]));
  return largest;
}

/// Steps on one device, a checkpoint, the rest on the other: beside all steps on one.
void move_checkpoint(const Sizes& sizes, const std::string& from, const std::string& to) {
  SingleProcess alone;
  Sizes begin = sizes;
  begin.steps = sizes.steps / 2;
  const auto folder = std::filesystem::temp_directory_path() / "bitfall_gpu_check";
  const auto first = make(sizes.model, "", kMoq, from, alone);
  train(*first, begin, 0);
  first->updater().save_checkpoint(folder, "moved", "");
  const auto second = make(sizes.model, "", kMoq, to, alone);
  second->updater().load_checkpoint(folder, "moved");
  const std::vector<double> moved = train(*second, sizes, begin.steps);
  const std::vector<double> stayed = train(*first, sizes, begin.steps);
  std::filesystem::remove_all(folder);
  report("checkpoint from " + from + " to " + to, largest_difference(moved, stayed, moved.size()),
         Limit::at_most, 1e-4, "relative");
}

/// A loss scale that is too large at first: the GPU, which decides by itself, skips the CPU's
/// steps.
void overflow(const Sizes& sizes) {
  SingleProcess alone;
  const std::string large_scale =
      R"(, "fp16": {"enabled": true, "initial_scale_power": 21, "hysteresis": 1})" + kMoq;
  const auto cpu = make(sizes.model, "", large_scale, "cpu", alone);
  const auto gpu = make(sizes.model, "", large_scale, "cuda", alone);
  const std::vector<double> expected = train(*cpu, sizes, 0), seen = train(*gpu, sizes, 0);
  report("loss beside the CPU's after overflows", largest_difference(seen, expected, seen.size()),
         Limit::at_most, 2e-2, "relative");
  const std::int64_t skipped = cpu->updater().skipped_steps();
  const bool as_the_cpu = gpu->updater().skipped_steps() == skipped;
  const bool some = 0 < skipped && skipped < sizes.steps;
  report("steps skipped as on the CPU", as_the_cpu && some ? 1 : 0, Limit::at_least, 1, "");
}

/// A short MoQ training with dropout on both devices, and twice on the GPU.
void compare(const Sizes& sizes) {
  for (const std::string precision : {"", "bf16", "fp16"}) {
    const std::string name = precision.empty() ? "f32" : precision;
    const std::vector<double> cpu = losses(sizes, precision, "cpu");
    const std::vector<double> gpu = losses(sizes, precision, "cuda");
    report("loss beside the CPU's, first 3 steps, " + name, largest_difference(gpu, cpu, 3),
           Limit::at_most, precision.empty() ? 1e-5 : 1e-3, "relative");
    report(concat("loss beside the CPU's, ", sizes.steps, " steps, ", name),
           largest_difference(gpu, cpu, cpu.size()), Limit::at_most, 2e-2, "relative");
    const bool repeated = losses(sizes, precision, "cuda") == gpu;
    report("repeated run gives equal losses, " + name, repeated ? 1 : 0, Limit::at_least, 1, "");
  }
  overflow(sizes);
  move_checkpoint(sizes, "cuda", "cpu");
  move_checkpoint(sizes, "cpu", "cuda");
  records();
}

/// Every rank trains on its share; rank 0 also alone on all of it.
void train_ranks(Communicator& world, int zero_stage) {
  constexpr int kSamples = 8;
  const int share = kSamples / world.world_size();
  const std::string zero = concat(R"(, "zero_optimization": {"stage": )", zero_stage, "}");
  const auto train_share = [&](Communicator& communicator, int first, int count) {
    const auto engine = make(bert(2, 32, 2, kSmallVocab), "", zero, "cuda", communicator);
    std::vector<double> result;
    for (int step = 0; step < 3; ++step) {
      const Batch batch = random_batch(step, first, count, 5, 20, kSmallVocab);
      result.push_back(engine->train_batch({&batch, 1}).loss);
    }
    return result;
  };
  const std::vector<double> together = train_share(world, world.rank() * share, share);
  if (world.rank() == 0) {
    SingleProcess alone;
    const std::vector<double> single = train_share(alone, 0, share * world.world_size());
    report(concat("loss of ", world.world_size(), " ranks beside one process, ZeRO stage ",
                  zero_stage),
           largest_difference(together, single, single.size()), Limit::at_most, 1e-5, "relative");
  }
  world.barrier();
}

/// Started by mpirun.
void ranks() {
  const std::unique_ptr<Communicator> world = make_communicator();
  for (const int stage : {0, 2}) train_ranks(*world, stage);
}

int run(std::string_view what) {
  try {
    if (what == "compare") {
      compare({bert(4, 128, 4, kSmallVocab), 30, 16, 90});
    } else if (what == "smoke") {
      compare({bert(2, 32, 2, kSmallVocab), 4, 4, 20});
    } else if (what == "ranks") {
      ranks();
    } else if (what == "speed") {
      speed();
    } else {
      std::cerr << "usage: gpu_check compare | smoke | ranks | speed\n";
      return 2;
    }
  } catch (const Error& error) {
    std::cerr << "gpu_check: " << error.what() << "\n";
    return 1;
  }
  return all_passed() ? 0 : 1;
}

}  // namespace
}  // namespace bitfall::gpu_check

int main(int argc, char** argv) { return bitfall::gpu_check::run(argc == 2 ? argv[1] : ""); }
