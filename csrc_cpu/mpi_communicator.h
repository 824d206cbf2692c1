// Communicator between processes started by mpirun. Compiled where MPI was found
// (BITFALL_WITH_MPI).
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "core/communicator.h"

namespace bitfall {

/// Whether mpirun (or another MPI launcher) started this process, judged by its environment.
bool started_by_mpi();

/// All ranks of MPI_COMM_WORLD. The calls of one rank come from one thread at a time, and every
/// rank makes the same calls in the same order.
///
/// The first communicator starts MPI, unless the process did so before; what was started here ends
/// when the process exits.
class MpiCommunicator final : public Communicator {
 public:
  /// Throws CommunicationError if MPI cannot start or has ended already.
  MpiCommunicator();
  ~MpiCommunicator() override;

  int rank() const override { return rank_; }
  int world_size() const override { return world_size_; }
  int local_rank() const override { return local_rank_; }

  /// With ReduceOp::max a NaN on any rank gives NaN on all. Throws UnsupportedError unless `values`
  /// are f32 on the CPU.
  void all_reduce(const Tensor& values, ReduceOp op) override;
  /// Reduces at once: the backward pass keeps every core busy, so work behind its back would only
  /// take turns with it, and now the gradients are still in cache.
  void all_reduce_async(const Tensor& values, ReduceOp op) override { all_reduce(values, op); }
  void reduce_async(const Tensor& values, ReduceOp op, int root) override;
  void wait_all() override {}
  void broadcast(const Tensor& values, int root) override;
  void broadcast(std::vector<std::byte>& bytes, int root) override;
  std::vector<std::vector<std::byte>> all_gather(const std::vector<std::byte>& bytes) override;
  void barrier() override;
  [[noreturn]] void abort(const std::string& message) override;

 private:
  struct Handles;
  void check_root(const char* call, int root) const;

  std::unique_ptr<Handles> handles_;
  int rank_ = 0;
  int world_size_ = 1;
  int local_rank_ = 0;
};

}  // namespace bitfall
