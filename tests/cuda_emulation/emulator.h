// Runs CUDA kernels on the CPU, so that their logic is tested where there is no GPU: indices,
// tails, barriers, warps that leave early. Threads of a block are fibers that take turns at
// barriers and warp operations. A warp goes on as far as it can before another does, from the first
// to the last and then the other way round, so that a missing barrier does not hide behind their
// order; a warp operation that not all lanes reach is a deadlock, and reported.
//
// Blocks start in order, one when the last has ended. Only where a block waits for another the next
// one starts, as long as there is room for it; blocks in flight then take turns. They also do when
// they take tickets (atomicAdd of 64 bits), as each would on a GPU. If all of them wait, that is a
// deadlock too.
//
// Work is done at once. With EMULATED_STREAMS=lazy in the environment it is done when somebody
// waits for it, so that what is read too early, or changed while it is still to be read, is wrong.
//
// What it cannot find: races within a warp between two waits, the rounding of tensor cores and
// fused multiply-add, limits of registers, anything about speed.
#pragma once

#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

struct CUstream_st;

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace emulator {

struct Index {
  unsigned x, y, z;
};
/// The emulated GPU, which has room for few blocks, so that tests come to its limits.
inline constexpr int kProcessors = 4, kBlocksPerProcessor = 2;
inline constexpr int kMostSharedBytes = 227 * 1024;  ///< of a block

extern Index thread_index, block_index, block_size, grid_size;

/// Ends the program with `what` unless `condition` holds.
void check(bool condition, const char* what);
/// Position of the running thread in its warp.
int lane();
void wait_for_block();
/// To be called again and again until another block has done what the thread waits for; between
/// that and its next wait it must come to a barrier.
void wait_for_other_blocks();
/// Lets every other block in flight, and new ones for which there is room, go on first.
void give_way();
/// As much as a lane brings to a warp operation.
using Words = std::array<std::uint64_t, 3>;
/// The words of all lanes of the warp, once each has brought its own; valid until the lane's next
/// exchange.
const std::array<Words, 32>& exchange_words(const Words& words);
void* dynamic_shared_memory();
bool in_dynamic_shared_memory(const void* address);
/// Calls `body` as every thread of every block.
void run(dim3 grid, dim3 block, std::size_t shared_bytes, const std::function<void()>& body);

template <typename T>
std::array<T, 32> exchange(T value) {
  static_assert(sizeof(T) <= sizeof(Words));
  Words own{};
  std::memcpy(&own, &value, sizeof(value));
  const std::array<Words, 32>& words = exchange_words(own);
  std::array<T, 32> values;
  for (std::size_t i = 0; i < 32; ++i) std::memcpy(&values[i], &words[i], sizeof(T));
  return values;
}

/// What a block of `kernel` may have of dynamic shared memory from now on; false if no GPU gives
/// it.
bool allow_shared_memory(const void* kernel, int bytes);
/// Ends the program unless `kernel` may have so much: what every GPU gives unasked, or as allowed.
void check_shared_memory(const void* kernel, std::size_t bytes);

/// Does `work` in `stream`: now, or when somebody waits for it (see streams.cpp); while a stream is
/// recorded, keeps it for the graph.
void submit(CUstream_st* stream, std::function<void()> work);
/// Does what all streams have still to do.
void finish_all();
/// Ends the program with the name of a `call` that is not allowed while a stream is recorded.
void check_not_recording(const char* call);

/// kernel<<<grid, block, shared_bytes, stream>>>(arguments...), as convert.py writes it.
template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, std::size_t shared_bytes,
            CUstream_st* stream, const Arguments&... arguments) {
  check_shared_memory(reinterpret_cast<const void*>(kernel), shared_bytes);
  submit(stream, [=] { run(grid, block, shared_bytes, [&] { kernel(arguments...); }); });
}

}  // namespace emulator
