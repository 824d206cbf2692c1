// Errors of CUDA and cuBLASLt as exceptions, and owners of their handles.
#pragma once

#include <cublasLt.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <memory>
#include <type_traits>

#include "core/error.h"
#include "core/tensor.h"

namespace bitfall {

/// Throws BackendError that names `call` unless `code` is cudaSuccess.
inline void cuda_check(cudaError_t code, const char* call) {
  if (code == cudaSuccess) return;
  cudaGetLastError();  // CUDA keeps it, and the next launch would be blamed
  throw BackendError(concat(call, " failed on the GPU: ", cudaGetErrorName(code), " (",
                            cudaGetErrorString(code), ")"));
}

/// The same for the kernel that was just launched by `operation`.
inline void check_launch(const char* operation) { cuda_check(cudaGetLastError(), operation); }

/// Throws BackendError that names `call` unless `code` is CUBLAS_STATUS_SUCCESS.
inline void cublas_check(cublasStatus_t code, const char* call) {
  check<BackendError>(code == CUBLAS_STATUS_SUCCESS, call,
                      " failed on the GPU: ", cublasLtGetStatusName(code), " (",
                      cublasLtGetStatusString(code), ")");
}

/// Owns a handle of a C library; `destroy` must not throw.
template <auto destroy>
struct HandleDeleter {
  template <typename Handle>
  void operator()(Handle* handle) const {
    destroy(handle);
  }
};
template <typename Handle, auto destroy>
using OwnedHandle = std::unique_ptr<std::remove_pointer_t<Handle>, HandleDeleter<destroy>>;

using CudaStream = OwnedHandle<cudaStream_t, cudaStreamDestroy>;
using CudaEvent = OwnedHandle<cudaEvent_t, cudaEventDestroy>;

/// For order only, not for times. Throws BackendError.
inline CudaEvent make_event() {
  cudaEvent_t event = nullptr;
  cuda_check(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "cudaEventCreateWithFlags");
  return CudaEvent(event);
}

/// Host memory that the GPU reads and writes without a detour, so that copies need not wait.
template <typename T>
using PinnedMemory = std::unique_ptr<T, HandleDeleter<cudaFreeHost>>;

/// A stream for which work of others on the default stream does not wait, nor it for theirs. Throws
/// BackendError.
inline CudaStream make_stream() {
  cudaStream_t stream = nullptr;
  cuda_check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking),
             "cudaStreamCreateWithFlags");
  return CudaStream(stream);
}

using DeviceMemory = std::unique_ptr<void, HandleDeleter<cudaFree>>;

/// Pinned memory for `bytes`. Throws BackendError.
template <typename T>
PinnedMemory<T> allocate_pinned(std::size_t bytes) {
  void* memory = nullptr;
  cuda_check(cudaMallocHost(&memory, bytes), "cudaMallocHost");
  return PinnedMemory<T>(static_cast<T*>(memory));
}

/// Typed address of a tensor on the GPU; null if the tensor is empty. Throws BackendError for one
/// in host memory, which a kernel must never see.
template <typename T>
T* device_data(const Tensor& tensor) {
  check<BackendError>(tensor.device == Device::cuda || tensor.data == nullptr,
                      "an operation on cuda got a tensor ", tensor.shape.to_string(), " ",
                      name(tensor.dtype), " in host memory: copy it to the GPU first");
  return tensor.as<T>();
}

}  // namespace bitfall
