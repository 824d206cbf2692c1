// Matrices of 8 x 8 in registers, from shared memory (ldmatrix) and multiplied on tensor cores
// (mma.m16n8k16): PTX ISA, "Warp-level matrix instructions". All 32 lanes of a warp must call what
// is said to be of the warp.
//
// Of a matrix, lane l has elements 2 (l % 4) and 2 (l % 4) + 1 of row l / 4, in one word.
#pragma once

#include <cstdint>
#include <type_traits>

#include "csrc_cuda/element.cuh"

namespace bitfall {

/// Four matrices of 16-bit elements.
struct Matrices {
  std::uint32_t word[4];
};

/// Of the warp. Row r of matrix m begins at `row` of lane 8 m + r: 16 bytes of shared memory at a
/// multiple of 16.
__device__ inline Matrices load_matrices(const void* row) {
  const auto address = static_cast<std::uint32_t>(__cvta_generic_to_shared(row));
  Matrices loaded;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(loaded.word[0]), "=r"(loaded.word[1]), "=r"(loaded.word[2]),
                 "=r"(loaded.word[3])
               : "r"(address)
               : "memory");
  return loaded;
}

/// The same, each matrix transposed.
__device__ inline Matrices load_matrices_transposed(const void* row) {
  const auto address = static_cast<std::uint32_t>(__cvta_generic_to_shared(row));
  Matrices loaded;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(loaded.word[0]), "=r"(loaded.word[1]), "=r"(loaded.word[2]),
                 "=r"(loaded.word[3])
               : "r"(address)
               : "memory");
  return loaded;
}

/// Of the warp: sums [16, 8] += a [16, 16] b [16, 8], T BFloat16 or Float16. volatile: the compiler
/// must not move it to where only some lanes want the result.
///
/// a: its quarters, upper left, lower left, upper right, lower right. low, high: rows 0-7 and 8-15
/// of b, each transposed. sums: columns 2 (l % 4) + {0, 1} of row l / 4, then of row l / 4 + 8.
template <typename T>
__device__ inline void multiply_add(float (&sums)[4], const Matrices& a, std::uint32_t low,
                                    std::uint32_t high) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a.word[0]), "r"(a.word[1]), "r"(a.word[2]), "r"(a.word[3]), "r"(low), "r"(high));
  } else {
    static_assert(std::is_same_v<T, Float16>);
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a.word[0]), "r"(a.word[1]), "r"(a.word[2]), "r"(a.word[3]), "r"(low), "r"(high));
  }
}

}  // namespace bitfall
