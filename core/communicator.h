// Communicator: what ranks say to each other. SingleProcess is the world of one rank.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "core/tensor.h"

namespace bitfall {

enum class ReduceOp { sum, mean, max };

class Communicator {
 public:
  virtual ~Communicator() = default;

  virtual int rank() const = 0;
  virtual int world_size() const = 0;
  /// Rank among the processes of this machine (chooses the GPU).
  virtual int local_rank() const = 0;

  /// In place, f32, the same bits on every rank. Throws CommunicationError.
  virtual void all_reduce(const Tensor& values, ReduceOp op) = 0;
  /// Starts a reduction that may overlap computation; `values` must stay untouched until wait_all.
  virtual void all_reduce_async(const Tensor& values, ReduceOp op) = 0;
  /// The same for one rank: `values` of `root` become the result, those of others undefined.
  virtual void reduce_async(const Tensor& values, ReduceOp op, int root) = 0;
  virtual void wait_all() = 0;
  /// Every rank's `values` (any dtype, the same size) become the root's.
  virtual void broadcast(const Tensor& values, int root) = 0;
  /// Every rank ends with the root's bytes (resized as needed).
  virtual void broadcast(std::vector<std::byte>& bytes, int root) = 0;
  /// Concatenation of every rank's bytes in rank order, on every rank.
  virtual std::vector<std::vector<std::byte>> all_gather(const std::vector<std::byte>& bytes) = 0;
  virtual void barrier() = 0;
  /// Ends all ranks at once after printing `message` with the rank. Does not return under MPI.
  virtual void abort(const std::string& message) = 0;
};

/// Element by element, added in rank order: the same on every rank. Each rank gives as many.
std::vector<double> sum_over_ranks(Communicator& communicator, std::vector<double> values);

/// World of one: reductions leave values as they are.
class SingleProcess final : public Communicator {
 public:
  int rank() const override { return 0; }
  int world_size() const override { return 1; }
  int local_rank() const override { return 0; }
  void all_reduce(const Tensor&, ReduceOp) override {}
  void all_reduce_async(const Tensor&, ReduceOp) override {}
  void reduce_async(const Tensor&, ReduceOp, int) override {}
  void wait_all() override {}
  void broadcast(const Tensor&, int) override {}
  void broadcast(std::vector<std::byte>&, int) override {}
  std::vector<std::vector<std::byte>> all_gather(const std::vector<std::byte>& bytes) override {
    return {bytes};
  }
  void barrier() override {}
  void abort(const std::string&) override {}
};

}  // namespace bitfall
