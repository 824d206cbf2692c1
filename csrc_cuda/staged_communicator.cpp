#include "csrc_cuda/staged_communicator.h"

namespace bitfall {

template <typename Action>
void StagedCommunicator::on_host(const Tensor& values, const Action& action) {
  if (values.device == Device::cpu) return action(values);
  staging_.resize(values.bytes());
  const Tensor staged{staging_.data(), values.dtype, values.shape, Device::cpu};
  backend_.copy(values, staged);
  action(staged);
  backend_.copy(staged, values);
}

void StagedCommunicator::all_reduce(const Tensor& values, ReduceOp op) {
  on_host(values, [&](const Tensor& staged) { host_.all_reduce(staged, op); });
}

void StagedCommunicator::reduce_async(const Tensor& values, ReduceOp op, int root) {
  on_host(values, [&](const Tensor& staged) {
    host_.reduce_async(staged, op, root);
    host_.wait_all();
  });
}

void StagedCommunicator::broadcast(const Tensor& values, int root) {
  on_host(values, [&](const Tensor& staged) { host_.broadcast(staged, root); });
}

}  // namespace bitfall
