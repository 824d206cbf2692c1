#include "csrc_cpu/mpi_communicator.h"

#include <mpi.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <iostream>

#include "core/error.h"

namespace bitfall {
namespace {

/// MPI counts are ints: longer messages go in pieces.
constexpr std::size_t kMessageBytes = std::size_t{1} << 24;
/// Reductions go in pieces whose working set stays in cache: twice as fast as one of 91 MB.
constexpr std::int64_t kReduceElements = std::int64_t{1} << 19;

void check_mpi(int code, const char* call) {
  if (code == MPI_SUCCESS) return;
  char text[MPI_MAX_ERROR_STRING] = "";
  int length = 0;
  MPI_Error_string(code, text, &length);
  throw CommunicationError(concat(call, " failed: ", std::string(text, length),
                                  "; all ranks must make the same calls with the same sizes"));
}

/// MPI for the rest of the process.
class MpiLibrary {
 public:
  MpiLibrary() {
    int finalized = 0, initialized = 0;
    MPI_Finalized(&finalized);
    check<CommunicationError>(finalized == 0,
                              "MPI has ended in this process: it cannot be started again");
    MPI_Initialized(&initialized);
    if (initialized != 0) return;
    int provided = MPI_THREAD_SINGLE;
    check_mpi(MPI_Init_thread(nullptr, nullptr, MPI_THREAD_SERIALIZED, &provided),
              "MPI_Init_thread");
    started_here_ = true;
    check<CommunicationError>(provided >= MPI_THREAD_SERIALIZED, "MPI_Init_thread: thread level ",
                              provided, ", expected MPI_THREAD_SERIALIZED; use another MPI build");
  }
  ~MpiLibrary() {
    int finalized = 0;
    MPI_Finalized(&finalized);
    if (started_here_ && finalized == 0) MPI_Finalize();
  }
  MpiLibrary(const MpiLibrary&) = delete;
  MpiLibrary& operator=(const MpiLibrary&) = delete;

 private:
  bool started_here_ = false;
};

/// MPI_MAX leaves open what becomes of a NaN, and ranks could disagree.
void max_or_nan(void* in, void* in_out, int* length, MPI_Datatype*) {
  const float* a = static_cast<const float*>(in);
  float* b = static_cast<float*>(in_out);
  for (int i = 0; i < *length; ++i) b[i] = std::isnan(a[i]) || a[i] > b[i] ? a[i] : b[i];
}

void check_reducible(const char* call, const Tensor& values) {
  check<UnsupportedError>(values.dtype == DType::f32 && values.device == Device::cpu, call,
                          " over MPI: dtype ", name(values.dtype),
                          ", expected f32 in host memory; cast the values first");
}

/// Calls `reduce(data, count)` for pieces of `values`.
template <typename Reduce>
void for_each_piece(const Tensor& values, const Reduce& reduce) {
  const std::int64_t numel = values.numel();
  for (std::int64_t begin = 0; begin < numel; begin += kReduceElements) {
    reduce(values.as<float>() + begin, static_cast<int>(std::min(kReduceElements, numel - begin)));
  }
}

void divide(float* data, int count, int world_size) {
  const float share = 1.0f / static_cast<float>(world_size);
  for (int i = 0; i < count; ++i) data[i] *= share;
}

}  // namespace

bool started_by_mpi() {
  for (const char* variable : {"OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMIX_RANK"}) {
    if (std::getenv(variable) != nullptr) return true;
  }
  return false;
}

struct MpiCommunicator::Handles {
  MPI_Comm world = MPI_COMM_NULL;
  MPI_Op max = MPI_OP_NULL;

  ~Handles() {
    int finalized = 0;
    MPI_Finalized(&finalized);
    if (finalized != 0) return;
    if (max != MPI_OP_NULL) MPI_Op_free(&max);
    if (world != MPI_COMM_NULL) MPI_Comm_free(&world);
  }

  void broadcast(void* data, std::size_t bytes, int root) const {
    for (std::size_t begin = 0; begin < bytes; begin += kMessageBytes) {
      const int count = static_cast<int>(std::min(kMessageBytes, bytes - begin));
      check_mpi(MPI_Bcast(static_cast<std::byte*>(data) + begin, count, MPI_BYTE, root, world),
                "MPI_Bcast");
    }
  }
};

MpiCommunicator::MpiCommunicator() : handles_(std::make_unique<Handles>()) {
  static const MpiLibrary library;
  check_mpi(MPI_Comm_dup(MPI_COMM_WORLD, &handles_->world), "MPI_Comm_dup");
  check_mpi(MPI_Comm_set_errhandler(handles_->world, MPI_ERRORS_RETURN), "MPI_Comm_set_errhandler");
  check_mpi(MPI_Comm_rank(handles_->world, &rank_), "MPI_Comm_rank");
  check_mpi(MPI_Comm_size(handles_->world, &world_size_), "MPI_Comm_size");
  check_mpi(MPI_Op_create(max_or_nan, 1, &handles_->max), "MPI_Op_create");
  MPI_Comm node = MPI_COMM_NULL;
  check_mpi(MPI_Comm_split_type(handles_->world, MPI_COMM_TYPE_SHARED, rank_, MPI_INFO_NULL, &node),
            "MPI_Comm_split_type");
  check_mpi(MPI_Comm_rank(node, &local_rank_), "MPI_Comm_rank");
  check_mpi(MPI_Comm_free(&node), "MPI_Comm_free");
}

MpiCommunicator::~MpiCommunicator() = default;

void MpiCommunicator::check_root(const char* call, int root) const {
  check<CommunicationError>(root >= 0 && root < world_size_, call, ": root ", root,
                            ", expected a rank from 0 to ", world_size_ - 1);
}

void MpiCommunicator::all_reduce(const Tensor& values, ReduceOp op) {
  check_reducible("all_reduce", values);
  const MPI_Op mpi_op = op == ReduceOp::max ? handles_->max : MPI_SUM;
  for_each_piece(values, [&](float* data, int count) {
    check_mpi(MPI_Allreduce(MPI_IN_PLACE, data, count, MPI_FLOAT, mpi_op, handles_->world),
              "MPI_Allreduce");
    if (op == ReduceOp::mean) divide(data, count, world_size_);
  });
}

void MpiCommunicator::reduce_async(const Tensor& values, ReduceOp op, int root) {
  check_reducible("reduce_async", values);
  check_root("reduce_async", root);
  const MPI_Op mpi_op = op == ReduceOp::max ? handles_->max : MPI_SUM;
  const bool is_root = rank_ == root;
  for_each_piece(values, [&](float* data, int count) {
    check_mpi(MPI_Reduce(is_root ? MPI_IN_PLACE : data, is_root ? data : nullptr, count, MPI_FLOAT,
                         mpi_op, root, handles_->world),
              "MPI_Reduce");
    if (is_root && op == ReduceOp::mean) divide(data, count, world_size_);
  });
}

void MpiCommunicator::broadcast(std::vector<std::byte>& bytes, int root) {
  check_root("broadcast", root);
  std::uint64_t size = bytes.size();
  handles_->broadcast(&size, sizeof(size), root);
  bytes.resize(size);
  handles_->broadcast(bytes.data(), size, root);
}

void MpiCommunicator::broadcast(const Tensor& values, int root) {
  check<UnsupportedError>(values.device == Device::cpu,
                          "broadcast over MPI: expected values in host memory");
  check_root("broadcast", root);
  handles_->broadcast(values.data, values.bytes(), root);
}

std::vector<std::vector<std::byte>> MpiCommunicator::all_gather(
    const std::vector<std::byte>& bytes) {
  std::vector<std::vector<std::byte>> all(static_cast<std::size_t>(world_size_));
  all[static_cast<std::size_t>(rank_)] = bytes;
  for (int root = 0; root < world_size_; ++root) {
    broadcast(all[static_cast<std::size_t>(root)], root);
  }
  return all;
}

void MpiCommunicator::barrier() { check_mpi(MPI_Barrier(handles_->world), "MPI_Barrier"); }

void MpiCommunicator::abort(const std::string& message) {
  std::cerr << concat("rank ", rank_, " of ", world_size_, ": ", message, "\n") << std::flush;
  MPI_Abort(handles_->world, 1);
  std::abort();  // MPI_Abort does not return; this tells the compiler
}

}  // namespace bitfall
