#include "csrc_cuda/nccl_library.h"

#include <dlfcn.h>

#include "core/error.h"

namespace bitfall {
namespace {

template <typename Function>
bool find(void* library, const char* name, Function& function) {
  function = reinterpret_cast<Function>(dlsym(library, name));
  return function != nullptr;
}

bool load(NcclLibrary& nccl) {
  void* const library = dlopen("libnccl.so.2", RTLD_NOW | RTLD_LOCAL);
  return library != nullptr && find(library, "ncclGetUniqueId", nccl.get_unique_id) &&
         find(library, "ncclCommInitRank", nccl.comm_init_rank) &&
         find(library, "ncclCommDestroy", nccl.comm_destroy) &&
         find(library, "ncclAllReduce", nccl.all_reduce) &&
         find(library, "ncclReduce", nccl.reduce) &&
         find(library, "ncclBroadcast", nccl.broadcast) &&
         find(library, "ncclGetErrorString", nccl.get_error_string);
}

}  // namespace

const NcclLibrary* nccl_library() {
  static NcclLibrary nccl;
  static const bool loaded = load(nccl);
  return loaded ? &nccl : nullptr;
}

void nccl_check(ncclResult_t code, const char* call) {
  if (code == ncclSuccess) return;
  throw CommunicationError(concat(call, " failed: ", nccl_library()->get_error_string(code),
                                  "; NCCL_DEBUG=INFO says more. All ranks must make the same "
                                  "calls with the same sizes"));
}

}  // namespace bitfall
