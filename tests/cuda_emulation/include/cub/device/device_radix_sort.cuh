// What csrc_cuda uses of CUB's sort. Stands in for NVIDIA's header of the same name.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstring>
#include <numeric>
#include <vector>

namespace cub {

struct DeviceRadixSort {
  /// Stable; the keys are below 2^end_bit. With null for `storage` it only says how many bytes of
  /// it it wants.
  template <typename Key, typename Value>
  static cudaError_t SortPairs(void* storage, std::size_t& bytes, const Key* keys, Key* sorted_keys,
                               const Value* values, Value* sorted_values, int count, int,
                               int end_bit, cudaStream_t stream) {
    const std::size_t wanted = static_cast<std::size_t>(count) * sizeof(int);
    if (storage == nullptr) {
      bytes = wanted;
      return cudaSuccess;
    }
    emulator::check(bytes >= wanted, "SortPairs: too little storage");
    emulator::submit(stream, [=] {
      std::memset(storage, 0xff, wanted);
      for (int i = 0; i < count; ++i)
        emulator::check(std::uint64_t{keys[i]} >> end_bit == 0, "SortPairs: a key has more bits");
      std::vector<int> order(static_cast<std::size_t>(count));
      std::iota(order.begin(), order.end(), 0);
      std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return keys[a] < keys[b]; });
      for (int i = 0; i < count; ++i) {
        sorted_keys[i] = keys[order[static_cast<std::size_t>(i)]];
        sorted_values[i] = values[order[static_cast<std::size_t>(i)]];
      }
    });
    return cudaSuccess;
  }
};

}  // namespace cub
