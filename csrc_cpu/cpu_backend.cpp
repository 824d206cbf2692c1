#include "csrc_cpu/cpu_backend.h"

#include <omp.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "csrc_cpu/matmul_cache.h"

namespace bitfall {
namespace {

constexpr std::size_t kAlignment = 64;
constexpr std::size_t kZeroedAtOnce = 4096;  ///< bytes: a page

std::size_t free_bytes() {
  const long pages = sysconf(_SC_AVPHYS_PAGES);
  return pages < 0
             ? 0
             : static_cast<std::size_t>(pages) * static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
}

bool is_zero(const std::byte* memory, std::size_t bytes) {
  // Equal to itself one byte further on: all bytes are the first.
  return memory[0] == std::byte{0} && std::memcmp(memory, memory + 1, bytes - 1) == 0;
}

/// Leaves zeros alone, so that memory that nobody has ever written stays with the system: most rows
/// of an embedding's gradient are such.
void zero_what_is_not(std::byte* memory, std::size_t bytes) {
  for (std::size_t begin = 0; begin < bytes; begin += kZeroedAtOnce) {
    const std::size_t count = std::min(kZeroedAtOnce, bytes - begin);
    if (!is_zero(memory + begin, count)) std::memset(memory + begin, 0, count);
  }
}

}  // namespace

CpuBackend::CpuBackend() : CpuBackend(choose_isa()) {}

CpuBackend::CpuBackend(CpuIsa isa)
    : kernels_(kernel_table(isa)), matmul_(std::make_unique<MatmulCache>()) {}

CpuBackend::~CpuBackend() = default;

Buffer CpuBackend::allocate(std::size_t bytes) {
  const std::size_t rounded = (bytes + kAlignment - 1) / kAlignment * kAlignment;
  void* memory = rounded < bytes ? nullptr : std::aligned_alloc(kAlignment, rounded);
  check<BackendError>(memory != nullptr || bytes == 0, "allocation of ", bytes,
                      " bytes failed, about ", free_bytes(),
                      " bytes are free: use a smaller micro-batch");
  if (memory != nullptr) zero_what_is_not(static_cast<std::byte*>(memory), rounded);
  return {std::shared_ptr<void>(memory, [](void* owned) { std::free(owned); }), bytes, Device::cpu};
}

void CpuBackend::copy(const Tensor& source, const Tensor& destination) {
  check<ShapeError>(source.numel() == destination.numel(), "copy: source has ", source.numel(),
                    " elements, destination ", destination.numel());
  check<UnsupportedError>(source.dtype == destination.dtype, "copy: source is ", name(source.dtype),
                          ", destination ", name(destination.dtype), "; cast converts");
  if (source.bytes() > 0) std::memmove(destination.data, source.data, source.bytes());
}

void CpuBackend::fill_zero(const Tensor& destination) {
  zero_what_is_not(static_cast<std::byte*>(destination.data), destination.bytes());
}

void* CpuBackend::scratch(std::size_t bytes) {
  if (scratch_.bytes() < bytes) scratch_ = allocate(bytes);
  return scratch_.memory().get();
}

ThreadScratch CpuBackend::thread_scratch(std::size_t bytes_per_thread) {
  const std::size_t rounded = (bytes_per_thread + kAlignment - 1) / kAlignment * kAlignment;
  const auto threads = static_cast<std::size_t>(omp_get_max_threads());
  return {static_cast<std::byte*>(scratch(threads * rounded)), rounded};
}

}  // namespace bitfall
