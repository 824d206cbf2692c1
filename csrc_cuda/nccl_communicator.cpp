#include "csrc_cuda/nccl_communicator.h"

#include <cstring>

#include "core/checks.h"

namespace bitfall {
namespace {

ncclRedOp_t nccl_op(ReduceOp op) { return op == ReduceOp::mean ? ncclAvg : ncclSum; }

ncclUniqueId shared_id(Communicator& host) {
  ncclUniqueId id{};
  std::vector<std::byte> bytes(sizeof(id));
  if (host.rank() == 0) {
    nccl_check(nccl_library()->get_unique_id(&id), "ncclGetUniqueId");
    std::memcpy(bytes.data(), &id, sizeof(id));
  }
  host.broadcast(bytes, 0);
  std::memcpy(&id, bytes.data(), sizeof(id));
  return id;
}

}  // namespace

NcclCommunicator::NcclCommunicator(CudaBackend& backend, Communicator& host)
    : backend_(backend), host_(host), staged_(backend, host) {
  backend.stream();  // makes its GPU the current one
  stream_ = make_stream();
  values_ready_ = make_event();
  reductions_done_ = make_event();
  ncclComm_t communicator = nullptr;
  const ncclUniqueId id = shared_id(host);
  nccl_check(nccl_library()->comm_init_rank(&communicator, host.world_size(), id, host.rank()),
             "ncclCommInitRank");
  communicator_.reset(communicator);
}

NcclCommunicator::~NcclCommunicator() = default;

bool NcclCommunicator::by_nccl(const Tensor& values, ReduceOp op) {
  return values.device == Device::cuda && op != ReduceOp::max;
}

cudaStream_t NcclCommunicator::stream_behind_backend() {
  cuda_check(cudaEventRecord(values_ready_.get(), backend_.stream()), "cudaEventRecord");
  cuda_check(cudaStreamWaitEvent(stream_.get(), values_ready_.get(), 0), "cudaStreamWaitEvent");
  return stream_.get();
}

void NcclCommunicator::all_reduce(const Tensor& values, ReduceOp op) {
  all_reduce_async(values, op);
  wait_all();
}

void NcclCommunicator::all_reduce_async(const Tensor& values, ReduceOp op) {
  if (!by_nccl(values, op)) return staged_.all_reduce(values, op);
  check_dtype("all_reduce", "values", values, DType::f32);
  nccl_check(nccl_library()->all_reduce(values.data, values.data,
                                        static_cast<std::size_t>(values.numel()), ncclFloat32,
                                        nccl_op(op), communicator_.get(), stream_behind_backend()),
             "ncclAllReduce");
}

void NcclCommunicator::reduce_async(const Tensor& values, ReduceOp op, int root) {
  if (!by_nccl(values, op)) return staged_.reduce_async(values, op, root);
  check_dtype("reduce", "values", values, DType::f32);
  nccl_check(nccl_library()->reduce(
                 values.data, values.data, static_cast<std::size_t>(values.numel()), ncclFloat32,
                 nccl_op(op), root, communicator_.get(), stream_behind_backend()),
             "ncclReduce");
}

void NcclCommunicator::wait_all() {
  cuda_check(cudaEventRecord(reductions_done_.get(), stream_.get()), "cudaEventRecord");
  cuda_check(cudaStreamWaitEvent(backend_.stream(), reductions_done_.get(), 0),
             "cudaStreamWaitEvent");
}

void NcclCommunicator::broadcast(const Tensor& values, int root) {
  if (values.device == Device::cpu) return host_.broadcast(values, root);
  nccl_check(nccl_library()->broadcast(values.data, values.data, values.bytes(), ncclInt8, root,
                                       communicator_.get(), stream_behind_backend()),
             "ncclBroadcast");
  wait_all();
}

}  // namespace bitfall
