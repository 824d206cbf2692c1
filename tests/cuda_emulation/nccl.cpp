// NCCL over MPI. Ranks meet in the calls, which they make in one order; results appear when the
// stream comes to them.
#include <mpi.h>
#include <nccl.h>

#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "tests/cuda_emulation/streams.h"

struct ncclComm {
  MPI_Comm ranks = MPI_COMM_NULL;
  int rank = 0, world_size = 0;
};

namespace {

/// Lets `exchange` work on a copy of `values`, which `stream` has made by then, and puts it into
/// `result` where there is one.
template <typename T, typename Exchange>
ncclResult_t run(const void* values, T* result, std::size_t count, cudaStream_t stream,
                 const Exchange& exchange) {
  cudaStreamSynchronize(stream);
  const auto* const begin = static_cast<const T*>(values);
  const auto copy = std::make_shared<std::vector<T>>(begin, begin + count);
  if (exchange(copy->data(), static_cast<int>(count)) != MPI_SUCCESS) return ncclInvalidArgument;
  if (result == nullptr) return ncclSuccess;
  emulator::enqueue(
      stream, [copy, result] { std::memcpy(result, copy->data(), copy->size() * sizeof(T)); });
  return ncclSuccess;
}

int all_reduce(float* values, int count, ncclRedOp_t operation, const ncclComm& communicator) {
  const int code =
      MPI_Allreduce(MPI_IN_PLACE, values, count, MPI_FLOAT, MPI_SUM, communicator.ranks);
  const float share = operation == ncclAvg ? 1.0f / static_cast<float>(communicator.world_size) : 1;
  for (int i = 0; i < count; ++i) values[i] *= share;
  return code;
}

}  // namespace

const char* ncclGetErrorString(ncclResult_t) { return "error of the emulator"; }

ncclResult_t ncclGetUniqueId(ncclUniqueId* id) {
  std::random_device random;
  for (char& byte : id->internal) byte = static_cast<char>(random());
  return ncclSuccess;
}

ncclResult_t ncclCommInitRank(ncclComm_t* communicator, int world_size, ncclUniqueId id, int rank) {
  auto made = std::make_unique<ncclComm>();
  MPI_Comm_dup(MPI_COMM_WORLD, &made->ranks);
  MPI_Comm_rank(made->ranks, &made->rank);
  MPI_Comm_size(made->ranks, &made->world_size);
  ncclUniqueId first = id;
  MPI_Bcast(&first, sizeof(first), MPI_BYTE, 0, made->ranks);
  const bool same = std::memcmp(&first, &id, sizeof(id)) == 0;
  if (!same || rank != made->rank || world_size != made->world_size) return ncclInvalidArgument;
  *communicator = made.release();
  return ncclSuccess;
}

ncclResult_t ncclCommDestroy(ncclComm_t communicator) {
  MPI_Comm_free(&communicator->ranks);
  delete communicator;
  return ncclSuccess;
}

ncclResult_t ncclAllReduce(const void* values, void* result, std::size_t count, ncclDataType_t,
                           ncclRedOp_t operation, ncclComm_t communicator, cudaStream_t stream) {
  return run(values, static_cast<float*>(result), count, stream, [=](float* data, int size) {
    return all_reduce(data, size, operation, *communicator);
  });
}

ncclResult_t ncclReduce(const void* values, void* result, std::size_t count, ncclDataType_t,
                        ncclRedOp_t operation, int root, ncclComm_t communicator,
                        cudaStream_t stream) {
  float* const kept = communicator->rank == root ? static_cast<float*>(result) : nullptr;
  return run(values, kept, count, stream, [=](float* data, int size) {
    return all_reduce(data, size, operation, *communicator);
  });
}

ncclResult_t ncclBroadcast(const void* values, void* result, std::size_t count, ncclDataType_t,
                           int root, ncclComm_t communicator, cudaStream_t stream) {
  return run(values, static_cast<std::byte*>(result), count, stream,
             [=](std::byte* data, int size) {
               return MPI_Bcast(data, size, MPI_BYTE, root, communicator->ranks);
             });
}
