// What csrc_cuda uses of NCCL. Stands in for NVIDIA's header of the same name.
#pragma once

#include <cuda_runtime.h>

enum ncclResult_t { ncclSuccess, ncclInvalidArgument };
enum ncclRedOp_t { ncclSum, ncclAvg };
enum ncclDataType_t { ncclInt8, ncclFloat32 };
struct ncclComm;
using ncclComm_t = ncclComm*;
struct ncclUniqueId {
  char internal[128];
};

extern "C" {
const char* ncclGetErrorString(ncclResult_t code);
ncclResult_t ncclGetUniqueId(ncclUniqueId* id);
ncclResult_t ncclCommInitRank(ncclComm_t* communicator, int world_size, ncclUniqueId id, int rank);
ncclResult_t ncclCommDestroy(ncclComm_t communicator);
ncclResult_t ncclAllReduce(const void* values, void* result, std::size_t count, ncclDataType_t,
                           ncclRedOp_t operation, ncclComm_t communicator, cudaStream_t stream);
ncclResult_t ncclReduce(const void* values, void* result, std::size_t count, ncclDataType_t,
                        ncclRedOp_t operation, int root, ncclComm_t communicator,
                        cudaStream_t stream);
ncclResult_t ncclBroadcast(const void* values, void* result, std::size_t count, ncclDataType_t,
                           int root, ncclComm_t communicator, cudaStream_t stream);
}
