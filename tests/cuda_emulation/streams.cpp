// Streams and events. EMULATED_STREAMS=lazy puts work off until the host waits for its stream or
// for an event behind it, or until another stream that waits for such an event comes to that.
#include "tests/cuda_emulation/streams.h"

#include <cuda_runtime.h>

#include <cstdlib>
#include <deque>
#include <memory>
#include <set>
#include <string_view>

namespace {

struct Queue {
  std::deque<std::function<void()>> waiting;
  std::uint64_t enqueued = 0, done = 0;

  void finish(std::uint64_t count) {
    while (done < count && !waiting.empty()) {
      const std::function<void()> work = std::move(waiting.front());
      waiting.pop_front();
      work();
      ++done;
    }
  }
};

std::set<std::shared_ptr<Queue>> queues;

std::shared_ptr<Queue> make_queue() { return *queues.insert(std::make_shared<Queue>()).first; }

const std::shared_ptr<Queue>& queue_of(cudaStream_t stream);

bool lazy() {
  static const char* const wanted = std::getenv("EMULATED_STREAMS");
  return wanted != nullptr && std::string_view(wanted) == "lazy";
}

}  // namespace

struct CUstream_st {
  std::shared_ptr<Queue> queue = make_queue();
};
/// Where it was recorded last; no queue: nowhere.
struct CUevent_st {
  std::shared_ptr<Queue> queue;
  std::uint64_t position = 0;
};

namespace {

const std::shared_ptr<Queue>& queue_of(cudaStream_t stream) {
  static CUstream_st default_stream;
  return stream == nullptr ? default_stream.queue : stream->queue;
}

/// No call may wait, or bring in another stream, while one is recorded.
cudaError_t wait(const char* call, const std::shared_ptr<Queue>& queue, std::uint64_t position) {
  emulator::check_not_recording(call);
  if (queue != nullptr) queue->finish(position);
  return cudaSuccess;
}

}  // namespace

void emulator::enqueue(cudaStream_t stream, std::function<void()> work) {
  Queue& queue = *queue_of(stream);
  queue.waiting.push_back(std::move(work));
  ++queue.enqueued;
  if (!lazy()) queue.finish(queue.enqueued);
}

void emulator::finish_all() {
  for (const std::shared_ptr<Queue>& queue : queues) queue->finish(queue->enqueued);
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  *stream = new CUstream_st;
  return cudaSuccess;
}

cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  stream->queue->finish(stream->queue->enqueued);
  queues.erase(stream->queue);
  delete stream;
  return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  const std::shared_ptr<Queue>& queue = queue_of(stream);
  return wait("cudaStreamSynchronize", queue, queue->enqueued);
}

cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
  emulator::check_not_recording("cudaStreamWaitEvent");
  emulator::enqueue(stream, [queue = event->queue, position = event->position] {
    if (queue != nullptr) queue->finish(position);
  });
  return cudaSuccess;
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  *event = new CUevent_st;
  return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  emulator::check_not_recording("cudaEventRecord");
  event->queue = queue_of(stream);
  event->position = event->queue->enqueued;
  return cudaSuccess;
}

cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  return wait("cudaEventSynchronize", event->queue, event->position);
}

cudaError_t cudaEventDestroy(cudaEvent_t event) {
  delete event;
  return cudaSuccess;
}

cudaError_t cudaMallocHost(void** memory, std::size_t bytes) {
  emulator::check_not_recording("cudaMallocHost");
  *memory = std::malloc(bytes);
  return *memory == nullptr ? emulated_failure(cudaErrorMemoryAllocation) : cudaSuccess;
}

cudaError_t cudaFreeHost(void* memory) {
  emulator::check_not_recording("cudaFreeHost");
  emulator::finish_all();
  std::free(memory);
  return cudaSuccess;
}
