// Streams that are recorded, and graphs that repeat what was.
#include <cuda_runtime.h>

#include <functional>
#include <vector>

struct CUgraph_st {
  std::vector<std::function<void()>> nodes;
};
struct CUgraphExec_st : CUgraph_st {};

namespace {

CUgraph_st* recording = nullptr;

}  // namespace

void emulator::submit(std::function<void()> work) {
  if (recording == nullptr) return work();
  recording->nodes.push_back(std::move(work));
}

void emulator::check_not_recording(const char* call) { check(recording == nullptr, call); }

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) {
  emulator::check(stream != nullptr, "the default stream cannot be recorded");
  emulator::check_not_recording("a stream is recorded already");
  recording = new CUgraph_st;
  return cudaSuccess;
}

cudaError_t cudaStreamEndCapture(cudaStream_t, cudaGraph_t* graph) {
  *graph = recording;
  recording = nullptr;
  return cudaSuccess;
}

cudaError_t cudaGraphInstantiate(cudaGraphExec_t* executable, cudaGraph_t graph, unsigned) {
  *executable = new CUgraphExec_st{*graph};
  return cudaSuccess;
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t) {
  for (const std::function<void()>& node : executable->nodes) node();
  return cudaSuccess;
}

cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  delete graph;
  return cudaSuccess;
}

cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable) {
  delete executable;
  return cudaSuccess;
}
