// GraphRecorder: pieces of a step as CUDA graphs, which the GPU works off without the host.
#pragma once

#include <cstdint>
#include <functional>

#include "core/lru_cache.h"
#include "core/recorder.h"
#include "csrc_cuda/cuda_utils.h"

namespace bitfall {

class CudaBackend;

/// What comes the first time is only done: it may choose algorithms and need memory, and may never
/// come again. The second time it is recorded.
class GraphRecorder final : public Recorder {
 public:
  /// For operations of `backend`, whose stream must not be CUDA's default stream.
  explicit GraphRecorder(CudaBackend& backend) : backend_(backend) {}

  /// Rows of a matrix that one block of a product computes at least.
  std::int64_t size_multiple() const override { return 64; }
  /// Throws BackendError, and what `work` throws.
  void run(const RecordKey& key, const std::function<void()>& work) override;

 private:
  using Graph = OwnedHandle<cudaGraphExec_t, cudaGraphExecDestroy>;
  struct Record {
    bool done_before = false;
    Graph graph;
  };
  static constexpr std::size_t kMostRecords = 1024;

  Graph record(const std::function<void()>& work) const;

  CudaBackend& backend_;
  LruCache<RecordKey, Record> records_{kMostRecords};
  const void* scratch_ = nullptr;  ///< of the backend, as records have it
};

}  // namespace bitfall
