// How rows of LayerNorm lie in registers, and the threads of a block that share a row.
//
// A thread holds up to four groups of eight neighbouring columns, the lanes of a warp neighbouring
// groups. A warp takes a row of up to 1024 columns; more columns take several warps, the whole
// block.
#pragma once

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <type_traits>

#include "core/error.h"
#include "core/tensor.h"
#include "csrc_cuda/dropout_mask.cuh"
#include "csrc_cuda/packed.cuh"
#include "csrc_cuda/reduce.cuh"

namespace bitfall {

/// What a kernel may assume of rows.
enum class RowKind {
  warp,   ///< a warp takes one; its groups are whole and lie at 16-byte boundaries
  block,  ///< the same, but the whole block takes one
  any     ///< nothing
};

inline constexpr int kMostGroups = 4;
inline constexpr int kWarpColumns = 8 * kWarpThreads;  ///< from a thread's group to its next

/// Calls `body(group, i)` for the elements of a thread's groups.
template <int kGroups, typename Body>
__device__ inline void for_each(Body&& body) {
#pragma unroll
  for (int group = 0; group < kGroups; ++group) {
#pragma unroll
    for (int i = 0; i < 8; ++i) body(group, i);
  }
}

/// Whether OwnColumns::kept has found that an element is kept.
__device__ inline bool is_kept(unsigned kept, int group, int i) {
  return (kept >> (8 * group + i) & 1u) != 0;
}

/// The columns of this thread, in `kGroups` groups.
template <typename T, int kGroups, RowKind kKind>
struct OwnColumns {
  int first;    ///< column of the first group; the others follow kWarpColumns apart
  int columns;  ///< of the row

  __device__ explicit OwnColumns(int columns)
      : first(static_cast<int>(threadIdx.x / kWarpThreads * (kGroups * kWarpColumns) +
                               threadIdx.x % kWarpThreads * 8)),
        columns(columns) {}

  __device__ int column(int group) const { return first + kWarpColumns * group; }
  /// Whether the row has the first column of a group.
  __device__ bool has(int group) const {
    // A row of a warp has no more groups than it needs, see RowLayout.
    return (kKind == RowKind::warp && group + 1 < kGroups) || column(group) < columns;
  }
  __device__ bool has(int group, int i) const {
    return kKind == RowKind::any ? column(group) + i < columns : has(group);
  }

  /// The elements of a row; those that it lacks become 0.
  __device__ void load(const T* row, Packed<T> (&groups)[kGroups]) const {
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      groups[group] = {};
      const T* const data = row + column(group);
      if constexpr (kKind != RowKind::any) {
        if (has(group)) groups[group] = *reinterpret_cast<const Packed<T>*>(data);
      } else {
#pragma unroll
        for (int i = 0; i < 8; ++i)
          if (has(group, i)) groups[group].set(i, data[i]);
      }
    }
  }

  __device__ void store(T* row, const Packed<T> (&groups)[kGroups]) const {
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      T* const data = row + column(group);
      if constexpr (kKind != RowKind::any) {
        if (has(group)) *reinterpret_cast<Packed<T>*>(data) = groups[group];
      } else {
#pragma unroll
        for (int i = 0; i < 8; ++i)
          if (has(group, i)) data[i] = groups[group].element(i);
      }
    }
  }

  /// The same, rounded.
  __device__ void store(T* row, const Eight (&values)[kGroups]) const {
    Packed<T> groups[kGroups];
#pragma unroll
    for (int group = 0; group < kGroups; ++group) groups[group] = packed<T>(values[group]);
    store(row, groups);
  }

  /// Bit 8 * group + i says whether dropout keeps column i of a group. All threads of a row must
  /// call it.
  __device__ unsigned kept(const DropoutMask& dropout, const RowKey& key) const {
    const int warp_first = first / kWarpColumns * kWarpColumns;  // column of the first lane
    unsigned bits = 0;
#pragma unroll 1  // fewer registers
    for (int group = 0; group < kGroups; ++group) {
      if (kKind != RowKind::warp && warp_first + kWarpColumns * group >= columns) break;
      bits |= kept_columns(dropout, key, static_cast<unsigned>(first) / 8 + kWarpThreads * group)
              << (8 * group);
    }
    return bits;
  }

  /// Sum over the threads of a row, in each of them. All of them must call it.
  __device__ float sum(float value) const {
    __shared__ float warps[kWarpThreads];
    return kKind == RowKind::warp || blockDim.x == kWarpThreads ? warp_sum(value)
                                                                : block_sum(value, warps);
  }

  /// destination [columns] = scale * the sums of what the threads of the block hold for each
  /// column, added in the order of their rows, which are `kRows` if a warp takes one. All threads
  /// of the block must call it.
  template <int kRows>
  __device__ void add_rows(const Eight (&values)[kGroups], float scale, float* destination) const {
    extern __shared__ __align__(16) float shared_rows[];  // see RowLayout::sum_bytes
    const bool known = kKind == RowKind::warp;            // and the loop below unrolled
    const int rows = known ? kRows : static_cast<int>(blockDim.y);
    const int threads = rows * (known ? kWarpThreads : static_cast<int>(blockDim.x));
    const int thread = static_cast<int>(threadIdx.y * blockDim.x + threadIdx.x);
    const int stride = (columns + 7) / 8 * 8;
    __syncthreads();  // the last readers are done
#pragma unroll
    for (int group = 0; group < kGroups; ++group)
      if (has(group))
        store_packs(shared_rows + threadIdx.y * stride + column(group), values[group]);
    __syncthreads();
    for (int i = thread; i < columns; i += threads) {
      float total = shared_rows[i];
#pragma unroll
      for (int row = 1; row < rows; ++row) total += shared_rows[row * stride + i];
      destination[i] = scale * total;
    }
  }
};

/// How rows are shared out, by the tensors' sizes and addresses alone.
struct RowLayout {
  RowKind kind;
  int groups;      ///< of a thread
  unsigned warps;  ///< of a row

  /// Throws UnsupportedError that names `operation` if `most_threads` cannot hold a row.
  RowLayout(const char* operation, std::int64_t columns, int most_threads,
            std::initializer_list<Tensor> tensors) {
    constexpr std::int64_t kThreadColumns = kMostGroups * 8, kMost = kMostGroups * kWarpColumns;
    check<UnsupportedError>(columns <= most_threads * kThreadColumns, operation,
                            " on cuda: hidden_size ", columns, " is more than the ",
                            most_threads * kThreadColumns,
                            " that a block holds: use a smaller model, or the cpu");
    const bool whole = std::all_of(tensors.begin(), tensors.end(),
                                   [](const Tensor& tensor) { return tensor.address() % 16 == 0; });
    warps = static_cast<unsigned>((columns + kMost - 1) / kMost);
    kind = warps == 1 ? RowKind::warp : RowKind::block;
    if (!whole || columns % 8 != 0) kind = RowKind::any;
    groups = kMostGroups;
    if (kind == RowKind::warp)
      groups = static_cast<int>((columns + kWarpColumns - 1) / kWarpColumns);
  }

  /// Threads of a row, and rows: `rows` of them if a warp takes one.
  dim3 block(unsigned rows) const { return {warps * kWarpThreads, warps == 1 ? rows : 1}; }

  /// Shared memory for OwnColumns::add_rows.
  static std::size_t sum_bytes(const dim3& block, std::int64_t columns) {
    return block.y * static_cast<std::size_t>((columns + 7) / 8 * 8) * sizeof(float);
  }

  /// Calls `body` with the groups and the kind as types.
  template <typename Body>
  void visit(Body&& body) const {
    constexpr std::integral_constant<int, kMostGroups> most;
    constexpr std::integral_constant<RowKind, RowKind::warp> warp;
    if (kind == RowKind::any) return body(most, std::integral_constant<RowKind, RowKind::any>());
    if (kind == RowKind::block)
      return body(most, std::integral_constant<RowKind, RowKind::block>());
    switch (groups) {
      case 1:
        return body(std::integral_constant<int, 1>(), warp);
      case 2:
        return body(std::integral_constant<int, 2>(), warp);
      case 3:
        return body(std::integral_constant<int, 3>(), warp);
      default:
        return body(most, warp);
    }
  }
};

/// Sums over rows on their way: each block leaves one partial sum. By the number of rows alone, so
/// that sums are reproducible.
struct RowSums {
  std::int64_t rows_per_block, blocks;

  explicit RowSums(std::int64_t rows) {
    constexpr std::int64_t kFewest = 16, kMostBlocks = 1024;
    rows_per_block = std::max(kFewest, (rows + kMostBlocks - 1) / kMostBlocks);
    blocks = (rows + rows_per_block - 1) / rows_per_block;
  }
};

}  // namespace bitfall
