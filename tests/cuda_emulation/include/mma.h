// Fragments of 16 x 16. Every lane holds all of one and stores its own eighth of a row pair, so a
// kernel that forgets to wait for its warp reads what is not there yet.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <type_traits>

namespace nvcuda::wmma {

struct matrix_a;
struct matrix_b;
struct accumulator;
struct row_major;
struct col_major;
enum layout_t { mem_row_major };

template <typename Use, int, int, int, typename Element, typename Layout = void>
struct fragment {
  float at[16][16];
};
using Sums = fragment<accumulator, 16, 16, 16, float>;

inline float as_float(float value) { return value; }
inline float as_float(__half value) { return __half2float(value); }
inline float as_float(__nv_bfloat16 value) { return __bfloat162float(value); }

/// What the hardware demands of a matrix in memory, and of its place what fragments.cuh demands.
inline void check_matrix(const void* data, unsigned stride, unsigned multiple) {
  emulator::check(emulator::in_dynamic_shared_memory(data), "wmma: not in shared memory");
  emulator::check(reinterpret_cast<std::uintptr_t>(data) % 32 == 0, "wmma: address");
  emulator::check(stride % multiple == 0, "wmma: stride");
}

template <typename Use, typename Element, typename Layout>
void load_matrix_sync(fragment<Use, 16, 16, 16, Element, Layout>& loaded, const Element* data,
                      unsigned stride) {
  check_matrix(data, stride, 8);
  for (unsigned i = 0; i < 16; ++i) {
    for (unsigned j = 0; j < 16; ++j) {
      const unsigned index = std::is_same_v<Layout, row_major> ? i * stride + j : j * stride + i;
      loaded.at[i][j] = as_float(data[index]);
    }
  }
}

inline void load_matrix_sync(Sums& loaded, const float* data, unsigned stride, layout_t) {
  check_matrix(data, stride, 4);
  for (unsigned i = 0; i < 16; ++i) {
    for (unsigned j = 0; j < 16; ++j) loaded.at[i][j] = data[i * stride + j];
  }
}

inline void store_matrix_sync(float* data, const Sums& stored, unsigned stride, layout_t) {
  check_matrix(data, stride, 4);
  for (auto i = static_cast<unsigned>(emulator::lane()); i < 256; i += 32)
    data[i / 16 * stride + i % 16] = stored.at[i / 16][i % 16];
}

inline void fill_fragment(Sums& filled, float value) {
  for (auto& row : filled.at) {
    for (float& element : row) element = value;
  }
}

template <typename Element, typename LayoutA, typename LayoutB>
void mma_sync(Sums& d, const fragment<matrix_a, 16, 16, 16, Element, LayoutA>& a,
              const fragment<matrix_b, 16, 16, 16, Element, LayoutB>& b, const Sums& c) {
  Sums sums = c;
  for (int i = 0; i < 16; ++i) {
    for (int k = 0; k < 16; ++k) {
      for (int j = 0; j < 16; ++j) sums.at[i][j] += a.at[i][k] * b.at[k][j];
    }
  }
  d = sums;
}

}  // namespace nvcuda::wmma
