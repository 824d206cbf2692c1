// Backend on an NVIDIA GPU: cuBLASLt for matrix products, our own kernels for the rest, one stream.
//
// The class is declared here and defined operation family by operation family in the files named
// like the family, the same names as in csrc_cpu (matmul.cpp, attention.cu, ...).
#pragma once

#include <cstdint>
#include <memory>
#include <optional>

#include "core/backend.h"
#include "core/communicator.h"
#include "csrc_cuda/cuda_utils.h"
#include "csrc_cuda/pinned_staging.h"

namespace bitfall {

class MatmulPlans;
class QuantizeTable;
struct TileRange;

class CudaBackend final : public Backend {
 public:
  /// GPU number `device_index` as CUDA counts them. Operations go to `stream`, a cudaStream_t that
  /// the caller keeps, or to a stream of their own. Throws BackendError.
  explicit CudaBackend(int device_index, std::optional<std::uintptr_t> stream = {});
  ~CudaBackend() override;

  // cuda_backend.cpp
  Device device() const override { return Device::cuda; }
  Buffer allocate(std::size_t bytes) override;
  void copy(const Tensor& source, const Tensor& destination) override;
  void synchronize() override;
  std::unique_ptr<Recorder> make_recorder() override;
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

  // elementwise.cu
  void cast(const Tensor& source, const Tensor& destination) override;
  void activation_backward(Activation activation, const Tensor& pre_activation, const Tensor& dy,
                           const Tensor& dpre, const Tensor& y) override;
  void activation_backward_tangent(Activation activation, const Tensor& pre_activation,
                                   const Tensor& pre_activation_tangent, const Tensor& dy,
                                   const Tensor& dy_tangent, const Tensor& dpre_tangent) override;
  void dropout(const Dropout& dropout, const Tensor& row_keys, const Tensor& x,
               const Tensor& y) override;

  // attention.cu
  void attention_forward(const AttentionShape& shape, const Tensor& qkv,
                         const Tensor& sequence_starts, const Tensor& sample_keys,
                         const Dropout& dropout, const Tensor& out,
                         const Tensor& log_sum_exp) override;
  void attention_backward(const AttentionShape& shape, const Tensor& dout, const Tensor& qkv,
                          const Tensor& out, const Tensor& log_sum_exp,
                          const Tensor& sequence_starts, const Tensor& sample_keys,
                          const Dropout& dropout, const Tensor& dqkv) override;

  // attention_tangent.cu
  void attention_forward_tangent(const AttentionShape& shape, const AttentionTangents& tangents,
                                 const Tensor& sequence_starts) override;
  void attention_backward_tangent(const AttentionShape& shape, const AttentionTangents& tangents,
                                  const Tensor& dout, const Tensor& dout_tangent,
                                  const Tensor& sequence_starts,
                                  const Tensor& dqkv_tangent) override;

  // layer_norm.cu
  void layer_norm_forward(const LayerNormForward& args) override;
  void layer_norm_backward(const LayerNormBackward& args) override;

  // layer_norm_tangent.cu
  void layer_norm_forward_tangent(const LayerNormForwardTangent& args) override;
  void layer_norm_backward_tangent(const LayerNormBackwardTangent& args) override;

  // embedding.cu
  void embedding_forward(const EmbeddingIds& ids, const EmbeddingTables& tables,
                         const Tensor& y) override;
  void gather_rows(const Tensor& x, const Tensor& row_index, const Tensor& y) override;
  void scatter_rows(const Tensor& dy, const Tensor& row_index, const Tensor& dx) override;

  // embedding_backward.cu
  void embedding_backward(const EmbeddingIds& ids, const Tensor& dy,
                          const EmbeddingTables& gradients) override;

  // loss.cu
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

  // adam.cu
  double squared_sum(const Tensor& x) override;
  void decide_update(const Tensor& loss, const Tensor& gradient, const UpdateLimits& limits,
                     const Tensor& decision) override;
  void decide_update(const Tensor& loss, double squared_norm, const UpdateLimits& limits,
                     const Tensor& decision) override;
  UpdateDecision last_decision() override;
  double dot(const Tensor& x, const Tensor& y) override;
  void axpby(float alpha, const Tensor& x, float beta, const Tensor& y) override;

  // adam_update.cu
  void adam_update(std::span<const AdamRange> ranges, const AdamTensors& tensors,
                   std::span<const FakeQuantizeRange> published, const Tensor& working) override;

  // fake_quantize.cu
  void fake_quantize(std::span<const FakeQuantizeRange> ranges, const Tensor& master,
                     const Tensor& working) override;

  /// The stream of every operation, with its GPU made the calling thread's current one.
  cudaStream_t stream() const;
  int device_index() const { return device_index_; }
  /// Memory that operations share; another when one has needed more.
  const void* scratch_memory() const { return scratch_.memory().get(); }
  /// Keeps the communicator of this GPU for as long as the backend lives.
  Communicator& adopt(std::unique_ptr<Communicator> communicator);

 private:
  /// Memory of at least `bytes` that the next operation may overwrite; grows and is kept.
  void* scratch(std::size_t bytes);
  /// Sums of the parts of an inner product, in scratch memory.
  struct DotParts {
    double* sums;
    int count;
  };
  DotParts enqueue_dot(const Tensor& x, const Tensor& y);  ///< adam.cu
  /// Decides, and begins to bring the decision to the host. adam.cu
  void enqueue_decision(const Tensor& loss, const DotParts& squared_norm,
                        const UpdateLimits& limits, const Tensor& decision);
  /// The table of `ranges`, until the next call. fake_quantize.cu
  const QuantizeTable& tile_table(std::span<const TileRange> ranges);
  /// Every row of y [R, N] (+)= x [N]. elementwise.cu
  void add_to_rows(const Tensor& x, const Tensor& y, Accumulate accumulate);
  /// y = activation(pre_activation). elementwise.cu
  void activation_forward(Activation activation, const Tensor& pre_activation, const Tensor& y);
  /// sums [columns] f32 (+)= column sums of x [rows, columns]; not to be called with x in scratch
  /// memory unless `work` begins behind it. column_sums.cu
  void column_sums(const Tensor& x, const Tensor& sums, Accumulate accumulate, float* work);
  /// f32 elements of `work` that column_sums of a matrix of these sizes needs.
  static std::int64_t column_sums_work(std::int64_t rows, std::int64_t columns);

  struct HostNumbers {
    double dot;
    UpdateDecision decision;
  };

  int device_index_;
  CudaStream own_stream_;                   ///< null if the caller has given one
  cudaStream_t stream_;                     ///< null is CUDA's default stream
  PinnedMemory<HostNumbers> host_numbers_;  ///< where the GPU writes what the host waits for
  CudaEvent decision_read_;                 ///< into host_numbers_
  PinnedStaging staging_;
  std::unique_ptr<MatmulPlans> matmul_;
  std::unique_ptr<QuantizeTable> quantize_table_;
  Buffer scratch_;
  std::unique_ptr<Communicator> communicator_;
};

}  // namespace bitfall
