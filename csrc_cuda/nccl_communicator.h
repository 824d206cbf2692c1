// Communicator between GPUs by NCCL. Reductions run on a stream of their own, behind the kernels
// that made their values and beside the ones that come after.
#pragma once

#include <memory>
#include <vector>

#include "core/communicator.h"
#include "csrc_cuda/cuda_backend.h"
#include "csrc_cuda/nccl_library.h"
#include "csrc_cuda/staged_communicator.h"

namespace bitfall {

/// Every rank of `host` has a GPU of its own. What is not a tensor on a GPU goes through `host`.
class NcclCommunicator final : public Communicator {
 public:
  /// All ranks together; `host` carries the id. NCCL must be there. Throws CommunicationError.
  NcclCommunicator(CudaBackend& backend, Communicator& host);
  ~NcclCommunicator() override;

  int rank() const override { return host_.rank(); }
  int world_size() const override { return host_.world_size(); }
  int local_rank() const override { return host_.local_rank(); }
  void all_reduce(const Tensor& values, ReduceOp op) override;
  void all_reduce_async(const Tensor& values, ReduceOp op) override;
  void reduce_async(const Tensor& values, ReduceOp op, int root) override;
  /// Makes the backend's stream wait, not the host.
  void wait_all() override;
  void broadcast(const Tensor& values, int root) override;
  void broadcast(std::vector<std::byte>& bytes, int root) override { host_.broadcast(bytes, root); }
  std::vector<std::vector<std::byte>> all_gather(const std::vector<std::byte>& bytes) override {
    return host_.all_gather(bytes);
  }
  void barrier() override { host_.barrier(); }
  void abort(const std::string& message) override { host_.abort(message); }

 private:
  struct CommunicatorDeleter {
    void operator()(ncclComm_t communicator) const { nccl_library()->comm_destroy(communicator); }
  };

  /// Whether NCCL does this one: values on a GPU, not a maximum, whose NaN it may lose.
  static bool by_nccl(const Tensor& values, ReduceOp op);
  /// The stream of reductions, behind everything on the backend's stream.
  cudaStream_t stream_behind_backend();

  CudaBackend& backend_;
  Communicator& host_;
  StagedCommunicator staged_;
  CudaStream stream_;
  CudaEvent values_ready_, reductions_done_;
  std::unique_ptr<ncclComm, CommunicatorDeleter> communicator_;
};

}  // namespace bitfall
