// The functions of NCCL, found at run time: a machine with one GPU need not have it.
#pragma once

#include <nccl.h>

namespace bitfall {

struct NcclLibrary {
  decltype(&ncclGetUniqueId) get_unique_id = nullptr;
  decltype(&ncclCommInitRank) comm_init_rank = nullptr;
  decltype(&ncclCommDestroy) comm_destroy = nullptr;
  decltype(&ncclAllReduce) all_reduce = nullptr;
  decltype(&ncclReduce) reduce = nullptr;
  decltype(&ncclBroadcast) broadcast = nullptr;
  decltype(&ncclGetErrorString) get_error_string = nullptr;
};

/// Null if libnccl.so.2 is not there or lacks a function. Loaded once.
const NcclLibrary* nccl_library();

/// Throws CommunicationError that names `call` unless `code` is ncclSuccess.
void nccl_check(ncclResult_t code, const char* call);

}  // namespace bitfall
