#include "csrc_cuda/graph_recorder.h"

#include "csrc_cuda/cuda_backend.h"

namespace bitfall {

void GraphRecorder::run(const RecordKey& key, const std::function<void()>& work) {
  if (scratch_ != backend_.scratch_memory()) {
    backend_.synchronize();  // none of them may be under way
    records_ = LruCache<RecordKey, Record>(kMostRecords);
    scratch_ = backend_.scratch_memory();
  }
  Record& found = records_.get(key, [] { return Record(); });
  if (!found.done_before) {
    work();
    found.done_before = true;
    return;
  }
  if (!found.graph) found.graph = record(work);
  cuda_check(cudaGraphLaunch(found.graph.get(), backend_.stream()), "cudaGraphLaunch");
}

GraphRecorder::Graph GraphRecorder::record(const std::function<void()>& work) const {
  const cudaStream_t stream = backend_.stream();
  cudaGraph_t recorded = nullptr;
  // Other threads go on using CUDA as they like.
  cuda_check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal),
             "cudaStreamBeginCapture");
  try {
    work();
  } catch (...) {
    cudaStreamEndCapture(stream, &recorded);
    if (recorded != nullptr) cudaGraphDestroy(recorded);
    cudaGetLastError();  // of a recording that has become invalid
    throw;
  }
  cuda_check(cudaStreamEndCapture(stream, &recorded), "cudaStreamEndCapture");
  const OwnedHandle<cudaGraph_t, cudaGraphDestroy> graph(recorded);
  cudaGraphExec_t executable = nullptr;
  cuda_check(cudaGraphInstantiate(&executable, graph.get(), 0), "cudaGraphInstantiate");
  return Graph(executable);
}

}  // namespace bitfall
