// The optimizer's update, and what is published after it, in one pass over memory.
//
// Compiled without fused multiply-add (see CMakeLists.txt), and every statement is that of
// csrc_cpu/kernels/adam.cpp: the update gives the CPU's bits.
#include "core/operation_checks.h"
#include "csrc_cuda/cuda_backend.h"
#include "csrc_cuda/tile_kernel.cuh"

namespace bitfall {
namespace {

struct AdamElement {
  float master, exp_avg, exp_avg_sq;
};

/// One element of the update, statement by statement as in csrc_cpu/kernels/adam.cpp.
__device__ inline AdamElement updated(const AdamStep& step, float multiplier, float gradient,
                                      const AdamElement& old) {
  const float weight = old.master;
  float g = gradient * multiplier;
  if (!step.adam_w_mode) g += step.weight_decay * weight;
  const float m = step.beta1 * old.exp_avg + (1.0f - step.beta1) * g;
  const float v = step.beta2 * old.exp_avg_sq + (1.0f - step.beta2) * g * g;
  const float denominator = sqrtf(v / step.bias_correction2) + step.epsilon;
  float change = (m / step.bias_correction1) / denominator;
  if (step.adam_w_mode) change += step.weight_decay * weight;
  return {weight - step.learning_rate * change, m, v};
}

/// Masters that are updated when they are first read.
struct AdamSource {
  static constexpr int kBlocksPerProcessor = 3;
  const UpdateDecision* decision;
  const float* gradient;
  float *master, *exp_avg, *exp_avg_sq;

  __device__ void load(const Item& item, Tile& tile) const {
    const bool updates = item.entry.masters == Masters::update && item.task != TileTask::write;
    if (updates && decision->skip == 0) {
      update(item, decision->gradient_multiplier, tile);
    } else {
      load_tile(item, master, tile);
    }
  }

  __device__ void update(const Item& item, float multiplier, Tile& tile) const {
    const AdamStep step = item.entry.step;
    const float* const g = gradient + item.first;
    float *const w = master + item.first, *const m = exp_avg + item.first,
                 *const v = exp_avg_sq + item.first;
    for_each_row(item, [&](int row) {
      const Eight gradients = load_row(item, g, row);
      Eight &weights = tile.rows[row], first = load_row(item, m, row),
            second = load_row(item, v, row);
      weights = load_row(item, w, row);
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const AdamElement element = updated(step, multiplier, gradients.value[j],
                                            {weights.value[j], first.value[j], second.value[j]});
        weights.value[j] = element.master;
        first.value[j] = element.exp_avg;
        second.value[j] = element.exp_avg_sq;
      }
      store_row(item, w, row, weights);
      store_row(item, m, row, first);
      store_row(item, v, row, second);
    });
  }
};

}  // namespace

void CudaBackend::adam_update(std::span<const AdamRange> ranges, const AdamTensors& tensors,
                              std::span<const FakeQuantizeRange> published, const Tensor& working) {
  check_adam(ranges, tensors, published, working);
  // Sums over ternary and binary groups need all their masters beforehand.
  std::vector<TileRange> beforehand, in_one;
  for (std::size_t i = 0; i < ranges.size(); ++i) {
    const AdamRange& range = ranges[i];
    const bool alone = published.empty() || is_sign_quantized(published[i].spec.bits);
    if (alone) beforehand.push_back({{range.begin, range.numel}, Masters::update, range.step});
    if (published.empty()) continue;
    in_one.push_back({published[i]});
    if (!alone) in_one.back() = {published[i], Masters::update, range.step};
  }
  const AdamSource source{device_data<const UpdateDecision>(tensors.decision),
                          device_data<const float>(tensors.gradient),
                          device_data<float>(tensors.master), device_data<float>(tensors.exp_avg),
                          device_data<float>(tensors.exp_avg_sq)};
  const auto run = [&](const std::vector<TileRange>& tiles, auto* target) {
    const QuantizeTable& table = tile_table(tiles);
    if (table.items() == 0) return;
    run_tiles("adam_update", table, source, target, scratch(tile_scratch_bytes(table)), stream());
  };
  if (!beforehand.empty()) run(beforehand, static_cast<float*>(nullptr));
  if (in_one.empty()) return;
  visit_dtype(working.dtype,
              [&](auto tag) { run(in_one, device_data<typename decltype(tag)::type>(working)); });
}

}  // namespace bitfall
