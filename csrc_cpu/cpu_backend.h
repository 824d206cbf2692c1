// Backend on the CPU: oneDNN for matrix products, hand-written kernels for the rest, OpenMP
// threads.
//
// The class is declared here and defined operation family by operation family in the files named
// like the family (matmul.cpp, attention.cpp, ...).
#pragma once

#include <functional>
#include <initializer_list>
#include <memory>
#include <vector>

#include "core/backend.h"
#include "csrc_cpu/kernels/kernels.h"

namespace bitfall {

class MatmulCache;
struct MatmulSpec;

/// Memory of thread i: bytes_per_thread from memory + i * bytes_per_thread.
struct ThreadScratch {
  std::byte* memory = nullptr;
  std::size_t bytes_per_thread = 0;
};

class CpuBackend final : public Backend {
 public:
  /// Uses the instruction set of choose_isa().
  CpuBackend();
  explicit CpuBackend(CpuIsa isa);
  ~CpuBackend() override;

  // cpu_backend.cpp
  Device device() const override { return Device::cpu; }
  Buffer allocate(std::size_t bytes) override;
  void copy(const Tensor& source, const Tensor& destination) override;
  void synchronize() override {}
  void fill_zero(const Tensor& destination) override;

  // matmul.cpp
  void linear_forward(const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& y,
                      Accumulate accumulate) override;
  void linear_activation_forward(const Tensor& x, const Tensor& weight, const Tensor& bias,
                                 Activation activation, const Tensor& pre_activation,
                                 const Tensor& y) override;
  void linear_backward_input(const Tensor& dy, const Tensor& weight, const Tensor& dx,
                             Accumulate accumulate) override;
  void linear_backward_weight(const Tensor& dy, const Tensor& x, const Tensor& dweight,
                              const Tensor& dbias, Accumulate accumulate) override;

  // elementwise.cpp
  void cast(const Tensor& source, const Tensor& destination) override;
  void activation_backward(Activation activation, const Tensor& pre_activation, const Tensor& dy,
                           const Tensor& dpre, const Tensor& y) override;
  void activation_backward_tangent(Activation activation, const Tensor& pre_activation,
                                   const Tensor& pre_activation_tangent, const Tensor& dy,
                                   const Tensor& dy_tangent, const Tensor& dpre_tangent) override;
  void dropout(const Dropout& dropout, const Tensor& row_keys, const Tensor& x,
               const Tensor& y) override;

  // attention.cpp
  void attention_forward(const AttentionShape& shape, const Tensor& qkv,
                         const Tensor& sequence_starts, const Tensor& sample_keys,
                         const Dropout& dropout, const Tensor& out,
                         const Tensor& log_sum_exp) override;
  void attention_backward(const AttentionShape& shape, const Tensor& dout, const Tensor& qkv,
                          const Tensor& out, const Tensor& log_sum_exp,
                          const Tensor& sequence_starts, const Tensor& sample_keys,
                          const Dropout& dropout, const Tensor& dqkv) override;
  void attention_forward_tangent(const AttentionShape& shape, const AttentionTangents& tangents,
                                 const Tensor& sequence_starts) override;
  void attention_backward_tangent(const AttentionShape& shape, const AttentionTangents& tangents,
                                  const Tensor& dout, const Tensor& dout_tangent,
                                  const Tensor& sequence_starts,
                                  const Tensor& dqkv_tangent) override;

  // layer_norm.cpp
  void layer_norm_forward(const LayerNormForward& args) override;
  void layer_norm_backward(const LayerNormBackward& args) override;
  void layer_norm_forward_tangent(const LayerNormForwardTangent& args) override;
  void layer_norm_backward_tangent(const LayerNormBackwardTangent& args) override;

  // embedding.cpp
  void embedding_forward(const EmbeddingIds& ids, const EmbeddingTables& tables,
                         const Tensor& y) override;
  void embedding_backward(const EmbeddingIds& ids, const Tensor& dy,
                          const EmbeddingTables& gradients) override;
  void gather_rows(const Tensor& x, const Tensor& row_index, const Tensor& y) override;
  void scatter_rows(const Tensor& dy, const Tensor& row_index, const Tensor& dx) override;

  // loss.cpp
  void cross_entropy_forward(const Tensor& logits, const Tensor& labels,
                             const Tensor& loss) override;
  void cross_entropy_backward(const Tensor& logits, const Tensor& labels, float scale,
                              const Tensor& dlogits) override;
  void cross_entropy_backward_tangent(const Tensor& logits, const Tensor& logits_tangent,
                                      float scale, const Tensor& dlogits_tangent) override;
  void mean_squared_error_forward(const Tensor& predictions, const Tensor& labels,
                                  const Tensor& loss) override;
  void mean_squared_error_backward(const Tensor& predictions, const Tensor& labels, float scale,
                                   const Tensor& dpredictions) override;
  void span_cross_entropy_forward(const Tensor& logits, const Tensor& sequence_starts,
                                  const Tensor& span_positions, const Tensor& loss) override;
  void span_cross_entropy_backward(const Tensor& logits, const Tensor& sequence_starts,
                                   const Tensor& span_positions, float scale,
                                   const Tensor& dlogits) override;
  void span_cross_entropy_backward_tangent(const Tensor& logits, const Tensor& logits_tangent,
                                           const Tensor& sequence_starts, float scale,
                                           const Tensor& dlogits_tangent) override;

  // adam.cpp
  double squared_sum(const Tensor& x) override;
  void decide_update(const Tensor& loss, const Tensor& gradient, const UpdateLimits& limits,
                     const Tensor& decision) override;
  void decide_update(const Tensor& loss, double squared_norm, const UpdateLimits& limits,
                     const Tensor& decision) override;
  UpdateDecision last_decision() override { return last_decision_; }
  double dot(const Tensor& x, const Tensor& y) override;
  void axpby(float alpha, const Tensor& x, float beta, const Tensor& y) override;
  void adam_update(std::span<const AdamRange> ranges, const AdamTensors& tensors,
                   std::span<const FakeQuantizeRange> published, const Tensor& working) override;

  // fake_quantize.cpp
  void fake_quantize(std::span<const FakeQuantizeRange> ranges, const Tensor& master,
                     const Tensor& working) override;

 private:
  using AfterRows = std::function<void(std::int64_t begin, std::int64_t end)>;

  /// Memory of at least `bytes` that the next call may overwrite; grows and is kept between steps.
  void* scratch(std::size_t bytes);
  /// The same for each thread of a parallel region, each from the beginning of a cache line.
  ThreadScratch thread_scratch(std::size_t bytes_per_thread);
  /// y (+)= x weight (+ bias), by way of f32 copies where the CPU does not multiply the dtype.
  void multiply_rows(const MatmulSpec& spec, const Tensor& x, const Tensor& weight,
                     const Tensor& bias, const Tensor& y, const AfterRows& after);
  /// f32 copies of `tensors`, one behind the other in scratch memory; empty ones stay empty.
  std::vector<Tensor> f32_copies(std::initializer_list<Tensor> tensors);
  void add_weight_gradient(const Tensor& dy, const Tensor& x, const Tensor& dweight,
                           Accumulate accumulate);
  /// adam_update without what is published. adam.cpp
  void update_masters(std::span<const AdamRange> ranges, const AdamTensors& tensors,
                      float multiplier);
  /// sums [N] f32 (+)= column sums of x [R, N], in an order that depends on R alone.
  void column_sums(const Tensor& x, const Tensor& sums, Accumulate accumulate);

  const KernelTable& kernels_;
  std::unique_ptr<MatmulCache> matmul_;
  Buffer scratch_;
  UpdateDecision last_decision_;
};

}  // namespace bitfall
