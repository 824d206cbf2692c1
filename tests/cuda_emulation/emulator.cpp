#include "tests/cuda_emulation/emulator.h"

#include <cuda_runtime.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <vector>

namespace emulator {

Index thread_index, block_index, block_size, grid_size;

namespace {

constexpr std::size_t kStackBytes = 256 * 1024;
constexpr std::size_t kMostThreads = 1024;
constexpr unsigned kMostAlongAxis = 65535;  ///< of y and z

enum class Waiting { no, for_block, for_warp, for_other_blocks, for_turn };

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  Index index;
  std::size_t number;
  Waiting waiting;
  bool done;
  std::size_t exchanges;  ///< begun
};

/// Two sets of words in turn: nobody begins an exchange before all lanes have begun the last one.
struct Warp {
  std::array<Words, 32> words[2];
  std::size_t arrivals[2];
};

/// A block in flight; `alive` is 0 when it has ended.
struct Block {
  Index index;
  std::vector<Fiber> fibers;  ///< kept, for their stacks
  std::vector<Warp> warps;
  std::vector<std::byte> shared_memory;
  std::size_t alive = 0;
  bool rising = false;  ///< order in which threads go on
};

std::array<Block, kBlocksPerProcessor * kProcessors> blocks;
ucontext_t scheduler;
Block* running_block = nullptr;
Fiber* running = nullptr;
const std::function<void()>* body = nullptr;
std::map<const void*, std::size_t> allowed_shared_bytes;  ///< of kernels that have asked

void yield() { swapcontext(&running->context, &scheduler); }

void fiber_main() {
  (*body)();
  running->done = true;
  yield();
}

void start(Block& block, const Index& index, std::size_t threads, std::size_t shared_bytes) {
  block.index = index;
  block.alive = threads;
  static std::size_t started = 0;
  block.rising = ++started % 2 == 0;
  block.shared_memory.assign(shared_bytes + 256, std::byte{0xff});  // NaN
  block.warps.assign((threads + 31) / 32, Warp{});
  if (block.fibers.size() < threads) block.fibers.resize(threads);
  for (std::size_t number = 0; number < threads; ++number) {
    Fiber& fiber = block.fibers[number];
    const auto n = static_cast<unsigned>(number);
    fiber.index = {n % block_size.x, n / block_size.x % block_size.y,
                   n / block_size.x / block_size.y};
    fiber.number = number;
    fiber.waiting = Waiting::no;
    fiber.done = false;
    fiber.exchanges = 0;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = &scheduler;
    makecontext(&fiber.context, fiber_main, 0);
  }
}

/// Lets a fiber go on until it waits or ends; returns whether it came further. What a fiber does
/// between two waits for other blocks does not count.
bool advance(Fiber& fiber) {
  const std::size_t exchanges = fiber.exchanges;
  const Waiting before = fiber.waiting;
  fiber.waiting = Waiting::no;
  running = &fiber;
  thread_index = fiber.index;
  swapcontext(&scheduler, &fiber.context);
  const bool same = !fiber.done && fiber.waiting == before && before != Waiting::no &&
                    fiber.exchanges == exchanges;
  return !same;
}

/// Where the threads of a warp, or of a block, have come to.
struct Standstill {
  bool further = false, waits_for_blocks = false;
  std::size_t at_barrier = 0;
};

/// Lets a warp go on, whatever the others do, until each of its threads waits for them or has
/// ended.
Standstill advance_warp(Block& block, std::size_t first, std::size_t end) {
  Standstill reached;
  for (bool progress = true; progress;) {
    progress = reached.waits_for_blocks = false;
    reached.at_barrier = 0;
    for (std::size_t i = first; i < end; ++i) {
      Fiber& fiber = block.fibers[block.rising ? i : first + end - 1 - i];
      if (fiber.done) continue;
      if (fiber.waiting == Waiting::for_block) {
        ++reached.at_barrier;
        continue;
      }
      if (fiber.waiting == Waiting::for_turn) {
        reached.waits_for_blocks = true;
        continue;
      }
      progress = advance(fiber) || progress;
      block.alive -= fiber.done ? 1 : 0;
      reached.waits_for_blocks =
          reached.waits_for_blocks || fiber.waiting == Waiting::for_other_blocks;
    }
    reached.further = reached.further || progress;
  }
  return reached;
}

/// Lets a block go on until it ends, gives way or can only wait for others; returns whether it came
/// further. Warps go on from the first to the last, then from the last to the first.
bool advance(Block& block, std::size_t threads) {
  running_block = &block;
  block_index = block.index;
  for (std::size_t number = 0; number < threads; ++number) {
    Waiting& waiting = block.fibers[number].waiting;
    if (waiting == Waiting::for_turn) waiting = Waiting::no;
  }
  const std::size_t warps = block.warps.size();
  for (bool further = false;; further = true) {
    Standstill reached;
    block.rising = !block.rising;
    for (std::size_t i = 0; i < warps; ++i) {
      const std::size_t warp = block.rising ? i : warps - 1 - i;
      const Standstill of_warp = advance_warp(block, 32 * warp, std::min(32 * (warp + 1), threads));
      reached.further = reached.further || of_warp.further;
      reached.waits_for_blocks = reached.waits_for_blocks || of_warp.waits_for_blocks;
      reached.at_barrier += of_warp.at_barrier;
    }
    if (reached.at_barrier > 0 && reached.at_barrier == block.alive) {
      for (std::size_t number = 0; number < threads; ++number)
        block.fibers[number].waiting = Waiting::no;
      reached.further = true;
    }
    if (block.alive == 0) return true;
    check(reached.further || reached.waits_for_blocks, "threads wait for others that never come");
    if (!reached.further) return further;
  }
}

/// Position number `number` in the grid.
Index index_in_grid(std::uint64_t number) {
  return {static_cast<unsigned>(number % grid_size.x),
          static_cast<unsigned>(number / grid_size.x % grid_size.y),
          static_cast<unsigned>(number / grid_size.x / grid_size.y)};
}

}  // namespace

void check(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "CUDA emulation: %s (block %u %u %u)\n", what, block_index.x, block_index.y,
               block_index.z);
  std::abort();
}

int lane() { return static_cast<int>(running->number % 32); }

void wait_for_block() {
  running->waiting = Waiting::for_block;
  yield();
}

void wait_for_other_blocks() {
  running->waiting = Waiting::for_other_blocks;
  yield();
}

void give_way() {
  running->waiting = Waiting::for_turn;
  yield();
}

const std::array<Words, 32>& exchange_words(const Words& words) {
  Fiber& self = *running;
  Warp& warp = running_block->warps[self.number / 32];
  const std::size_t set = self.exchanges % 2;
  const std::size_t awaited = 32 * (self.exchanges / 2 + 1);
  ++self.exchanges;
  warp.words[set][self.number % 32] = words;
  ++warp.arrivals[set];
  while (warp.arrivals[set] < awaited) {
    self.waiting = Waiting::for_warp;
    yield();
  }
  return warp.words[set];
}

void* dynamic_shared_memory() {
  std::byte* const memory = running_block->shared_memory.data();
  const std::uintptr_t behind = reinterpret_cast<std::uintptr_t>(memory) % 256;
  return memory + (256 - behind) % 256;
}

bool in_dynamic_shared_memory(const void* address) {
  const std::vector<std::byte>& memory = running_block->shared_memory;
  const auto first = reinterpret_cast<std::uintptr_t>(memory.data());
  return reinterpret_cast<std::uintptr_t>(address) - first < memory.size();
}

bool allow_shared_memory(const void* kernel, int bytes) {
  if (bytes > kMostSharedBytes) return false;
  allowed_shared_bytes[kernel] = static_cast<std::size_t>(bytes);
  return true;
}

void check_shared_memory(const void* kernel, std::size_t bytes) {
  constexpr std::size_t kUnasked = 48 * 1024;
  const auto allowed = allowed_shared_bytes.find(kernel);
  const std::size_t most = allowed == allowed_shared_bytes.end() ? kUnasked : allowed->second;
  check(bytes <= most, "more shared memory than cudaFuncSetAttribute has allowed");
}

void run(dim3 grid, dim3 block, std::size_t shared_bytes, const std::function<void()>& kernel) {
  const std::size_t threads = std::size_t{block.x} * block.y * block.z;
  check(threads > 0 && threads <= kMostThreads, "bad block size");
  check(grid.x > 0 && grid.y > 0 && grid.z > 0 && grid.y <= kMostAlongAxis &&
            grid.z <= kMostAlongAxis,
        "bad grid size");
  grid_size = {grid.x, grid.y, grid.z};
  block_size = {block.x, block.y, block.z};
  body = &kernel;
  const std::uint64_t count = std::uint64_t{grid.x} * grid.y * grid.z;
  std::uint64_t started = 0;
  bool alive = true;
  // In turns from the first and from the last, so that none is always ahead of another.
  for (bool rising = true; alive; rising = !rising) {
    bool progress = false;
    alive = false;
    for (std::size_t i = 0; i < blocks.size(); ++i) {
      Block& block = blocks[rising ? i : blocks.size() - 1 - i];
      if (block.alive > 0) progress = advance(block, threads) || progress;
      for (; block.alive == 0 && started < count; progress = true) {
        start(block, index_in_grid(started++), threads, shared_bytes);
        advance(block, threads);
      }
      alive = alive || block.alive > 0;
    }
    check(progress || !alive, "blocks wait for others that never come");
  }
}

}  // namespace emulator

namespace {

constexpr std::size_t kPage = 4096;
std::map<void*, std::pair<void*, std::size_t>> mappings;

}  // namespace

cudaError_t cudaMalloc(void** memory, std::size_t bytes) {
  emulator::check_not_recording("cudaMalloc");
  if (bytes > std::size_t{1} << 40) return emulated_failure(cudaErrorMemoryAllocation);
  const std::size_t rounded = (bytes + 31) / 32 * 32;
  const std::size_t total = (rounded + kPage - 1) / kPage * kPage + 2 * kPage;
  void* const mapping =
      mmap(nullptr, total, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapping == MAP_FAILED) return emulated_failure(cudaErrorMemoryAllocation);
  auto* const begin = static_cast<std::byte*>(mapping);
  mprotect(begin, kPage, PROT_NONE);
  mprotect(begin + total - kPage, kPage, PROT_NONE);
  *memory = begin + total - kPage - rounded;
  mappings[*memory] = {mapping, total};
  return cudaSuccess;
}

cudaError_t cudaFree(void* memory) {
  emulator::check_not_recording("cudaFree");
  emulator::finish_all();
  const auto found = mappings.find(memory);
  if (found == mappings.end()) return cudaSuccess;
  munmap(found->second.first, found->second.second);
  mappings.erase(found);
  return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void* memory, int value, std::size_t bytes, cudaStream_t stream) {
  emulator::submit(stream, [=] { std::memset(memory, value, bytes); });
  return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void* destination, const void* source, std::size_t bytes,
                            cudaMemcpyKind, cudaStream_t stream) {
  emulator::submit(stream, [=] { std::memmove(destination, source, bytes); });
  return cudaSuccess;
}
