// Streams that are recorded, and graphs that repeat what was.
#include <cuda_runtime.h>

#include <functional>
#include <memory>
#include <vector>

#include "tests/cuda_emulation/streams.h"

using Nodes = std::vector<std::function<void()>>;

struct CUgraph_st {
  Nodes nodes;
};
struct CUgraphExec_st {
  std::shared_ptr<const Nodes> nodes;  ///< a launch under way keeps them
};

namespace {

CUgraph_st* recording = nullptr;

}  // namespace

void emulator::submit(cudaStream_t stream, std::function<void()> work) {
  if (recording == nullptr) return enqueue(stream, std::move(work));
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
  *executable = new CUgraphExec_st{std::make_shared<const Nodes>(graph->nodes)};
  return cudaSuccess;
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t stream) {
  emulator::submit(stream, [nodes = executable->nodes] {
    for (const std::function<void()>& node : *nodes) node();
  });
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
