// Reductions of device tensors through host memory: where NCCL is missing, or ranks share a GPU.
#pragma once

#include <cstddef>
#include <vector>

#include "core/backend.h"
#include "core/communicator.h"

namespace bitfall {

/// `host` and `backend` must outlive it. Everything happens at once, also what is called async.
class StagedCommunicator final : public Communicator {
 public:
  StagedCommunicator(Backend& backend, Communicator& host) : backend_(backend), host_(host) {}

  int rank() const override { return host_.rank(); }
  int world_size() const override { return host_.world_size(); }
  int local_rank() const override { return host_.local_rank(); }
  void all_reduce(const Tensor& values, ReduceOp op) override;
  void all_reduce_async(const Tensor& values, ReduceOp op) override { all_reduce(values, op); }
  void reduce_async(const Tensor& values, ReduceOp op, int root) override;
  void wait_all() override {}
  void broadcast(const Tensor& values, int root) override;
  void broadcast(std::vector<std::byte>& bytes, int root) override { host_.broadcast(bytes, root); }
  std::vector<std::vector<std::byte>> all_gather(const std::vector<std::byte>& bytes) override {
    return host_.all_gather(bytes);
  }
  void barrier() override { host_.barrier(); }
  void abort(const std::string& message) override { host_.abort(message); }

 private:
  /// Calls `action(copy of values in host memory)` and copies the result back.
  template <typename Action>
  void on_host(const Tensor& values, const Action& action);

  Backend& backend_;
  Communicator& host_;
  std::vector<std::byte> staging_;
};

}  // namespace bitfall
