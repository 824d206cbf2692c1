// What csrc_cuda uses of CUDA, on the CPU: see emulator.h. Stands in for NVIDIA's header of the
// same name.
#pragma once

#include <unistd.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <utility>

#include "tests/cuda_emulation/emulator.h"

#define CUDART_VERSION 13000
#define __device__
#define __host__
#define __global__
#define __launch_bounds__(...)
#define __grid_constant__
// May be static while one block runs at a time; one that waits for others has to take the dynamic
// shared memory of its launch.
#define __shared__ static

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorMemoryAllocation = 2,
  cudaErrorNoDevice = 100
};
enum cudaMemcpyKind { cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost, cudaMemcpyDeviceToDevice };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount, cudaDevAttrMaxSharedMemoryPerBlockOptin };
enum cudaStreamCaptureMode { cudaStreamCaptureModeThreadLocal };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
inline constexpr unsigned cudaStreamNonBlocking = 1, cudaEventDisableTiming = 2;

struct CUstream_st;
struct CUevent_st;
struct CUgraph_st;
struct CUgraphExec_st;
using cudaStream_t = CUstream_st*;
using cudaEvent_t = CUevent_st*;
using cudaGraph_t = CUgraph_st*;
using cudaGraphExec_t = CUgraphExec_st*;

struct cudaUUID_t {
  char bytes[16];
};
struct cudaDeviceProp {
  char name[256];
  cudaUUID_t uuid;
  std::size_t totalGlobalMem;
  int major, minor;
};
struct float2 {
  float x, y;
};

inline const char* cudaGetErrorName(cudaError_t) { return "error of the emulator"; }
inline const char* cudaGetErrorString(cudaError_t) { return "see its standard error"; }
/// Calls that fail keep their error until it is asked for, as CUDA does.
inline cudaError_t emulated_last_error = cudaSuccess;
inline cudaError_t emulated_failure(cudaError_t code) { return emulated_last_error = code; }
inline cudaError_t cudaGetLastError() { return std::exchange(emulated_last_error, cudaSuccess); }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}
inline cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int) {
  const char* major = std::getenv("EMULATED_COMPUTE_CAPABILITY");
  *properties = {
      "emulator on the CPU", {}, std::size_t{8} << 30, major == nullptr ? 9 : std::atoi(major), 0};
  if (std::getenv("EMULATED_GPU_PER_PROCESS") != nullptr) {
    const int process = getpid();
    std::memcpy(properties->uuid.bytes, &process, sizeof(process));
  }
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount ? emulator::kProcessors
                                                       : emulator::kMostSharedBytes;
  return cudaSuccess;
}
template <typename Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel*, int, std::size_t) {
  *blocks = emulator::kBlocksPerProcessor;
  return cudaSuccess;
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned);
cudaError_t cudaStreamDestroy(cudaStream_t stream);
cudaError_t cudaStreamSynchronize(cudaStream_t stream);
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned);
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned);
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream);
cudaError_t cudaEventSynchronize(cudaEvent_t event);
cudaError_t cudaEventDestroy(cudaEvent_t event);
cudaError_t cudaMallocHost(void** memory, std::size_t bytes);
cudaError_t cudaFreeHost(void* memory);
inline cudaError_t cudaMemGetInfo(std::size_t* free_bytes, std::size_t* total_bytes) {
  *free_bytes = *total_bytes = 0;
  return cudaSuccess;
}
/// Between two pages that may not be touched, so that accesses outside end the program.
cudaError_t cudaMalloc(void** memory, std::size_t bytes);
cudaError_t cudaFree(void* memory);
cudaError_t cudaMemsetAsync(void* memory, int value, std::size_t bytes, cudaStream_t);
cudaError_t cudaMemcpyAsync(void* destination, const void* source, std::size_t bytes,
                            cudaMemcpyKind, cudaStream_t);
cudaError_t cudaStreamBeginCapture(cudaStream_t, cudaStreamCaptureMode);
cudaError_t cudaStreamEndCapture(cudaStream_t, cudaGraph_t* graph);
cudaError_t cudaGraphInstantiate(cudaGraphExec_t* executable, cudaGraph_t graph, unsigned);
cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t);
cudaError_t cudaGraphDestroy(cudaGraph_t graph);
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable);
template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute, int value) {
  const bool allowed = emulator::allow_shared_memory(reinterpret_cast<const void*>(kernel), value);
  return allowed ? cudaSuccess : emulated_failure(cudaErrorInvalidValue);
}

// --- what kernels call

#define threadIdx (emulator::thread_index)
#define blockIdx (emulator::block_index)
#define blockDim (emulator::block_size)
#define gridDim (emulator::grid_size)

inline void __syncthreads() { emulator::wait_for_block(); }
inline void __nanosleep(unsigned) { emulator::wait_for_other_blocks(); }
inline void __threadfence() {}
inline void __syncwarp() { emulator::exchange<int>(0); }

template <typename T>
T __shfl_xor_sync(unsigned, T value, int distance) {
  return emulator::exchange(value)[emulator::lane() ^ distance];
}
inline unsigned __ballot_sync(unsigned, bool vote) {
  const auto votes = emulator::exchange(vote);
  unsigned bits = 0;
  for (int lane = 0; lane < 32; ++lane) bits |= static_cast<unsigned>(votes[lane]) << lane;
  return bits;
}
inline int __reduce_min_sync(unsigned, int value) {
  for (const int other : emulator::exchange(value)) value = other < value ? other : value;
  return value;
}
inline int __reduce_max_sync(unsigned, int value) {
  for (const int other : emulator::exchange(value)) value = other > value ? other : value;
  return value;
}

template <typename T>
T min(T a, T b) {
  return b < a ? b : a;
}
template <typename T>
T max(T a, T b) {
  return a < b ? b : a;
}
template <typename T>
T atomicMax(T* address, T value) {
  return std::exchange(*address, max(*address, value));
}
template <typename T>
T atomicAdd(T* address, T value) {
  return std::exchange(*address, *address + value);
}
/// Counters of this size hand out tickets: what one is for waits while others take theirs.
inline unsigned long long atomicAdd(unsigned long long* address, unsigned long long value) {
  const unsigned long long before = std::exchange(*address, *address + value);
  emulator::give_way();
  return before;
}
inline float __fmaf_rn(float x, float y, float z) { return std::fma(x, y, z); }
inline unsigned __float_as_uint(float value) { return std::bit_cast<unsigned>(value); }
inline float __uint_as_float(unsigned bits) { return std::bit_cast<float>(bits); }
inline float __int_as_float(int bits) { return std::bit_cast<float>(bits); }
