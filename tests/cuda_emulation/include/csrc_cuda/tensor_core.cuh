// Stands in for csrc_cuda/tensor_core.cuh, which is written in PTX: every lane brings what it has
// and takes from the others what the hardware would give it. A kernel that forgets to wait for its
// warp reads what is not there yet.
#pragma once

#include "csrc_cuda/element.cuh"

namespace bitfall {

struct Matrices {
  std::uint32_t word[4];
};

namespace emulated {

/// Lanes bring where the rows of four matrices begin: eight rows of eight elements each.
struct Rows {
  std::array<const std::uint16_t*, 32> row;

  explicit Rows(const void* own) {
    emulator::check(emulator::in_dynamic_shared_memory(own), "ldmatrix: not in shared memory");
    emulator::check(reinterpret_cast<std::uintptr_t>(own) % 16 == 0, "ldmatrix: address");
    row = emulator::exchange(static_cast<const std::uint16_t*>(own));
  }
  std::uint32_t pair(std::uint16_t low, std::uint16_t high) const {
    return low | static_cast<std::uint32_t>(high) << 16;
  }
};

/// What a lane brings to a product.
struct Factors {
  Matrices a;
  std::uint32_t b[2];
};

/// Element [row, column] of a matrix whose words the lanes have.
template <typename T, typename WordOf>
float element(const WordOf& word_of, int row, int column) {
  const std::uint32_t word = word_of(4 * row + column / 2);
  return widen(T{static_cast<std::uint16_t>(column % 2 == 0 ? word : word >> 16)});
}

}  // namespace emulated

inline Matrices load_matrices(const void* row) {
  const emulated::Rows rows(row);
  const int lane = emulator::lane();
  Matrices loaded;
  for (int m = 0; m < 4; ++m) {
    const std::uint16_t* const own = rows.row[8 * m + lane / 4] + 2 * (lane % 4);
    loaded.word[m] = rows.pair(own[0], own[1]);
  }
  return loaded;
}

inline Matrices load_matrices_transposed(const void* row) {
  const emulated::Rows rows(row);
  const int lane = emulator::lane(), first = 2 * (lane % 4);
  Matrices loaded;
  for (int m = 0; m < 4; ++m) {
    loaded.word[m] =
        rows.pair(rows.row[8 * m + first][lane / 4], rows.row[8 * m + first + 1][lane / 4]);
  }
  return loaded;
}

template <typename T>
void multiply_add(float (&sums)[4], const Matrices& a, std::uint32_t low, std::uint32_t high) {
  const auto lanes = emulator::exchange(emulated::Factors{a, {low, high}});
  const int lane = emulator::lane();
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4, column = 2 * (lane % 4) + i % 2;
    float sum = sums[i];
    for (int k = 0; k < 16; ++k) {
      // Quarters of a lie left column first; halves of b are transposed.
      const int quarter = i / 2 + 2 * (k / 8);
      const float left =
          emulated::element<T>([&](int other) { return lanes[other].a.word[quarter]; }, row, k % 8);
      const float right =
          emulated::element<T>([&](int other) { return lanes[other].b[k / 8]; }, column, k % 8);
      sum += left * right;
    }
    sums[i] = sum;
  }
}

}  // namespace bitfall
