// Fragments of 16 x 16 for tensor cores, bf16 and f16 with sums in f32, out of shared memory.
#pragma once

#include <mma.h>

#include <cstdint>

#include "csrc_cuda/element.cuh"

namespace bitfall {

namespace wmma = nvcuda::wmma;

inline constexpr int kFragment = 16;

template <typename T>
struct MatrixElement;
template <>
struct MatrixElement<BFloat16> {
  using type = __nv_bfloat16;
};
template <>
struct MatrixElement<Float16> {
  using type = __half;
};

template <typename T>
using RowsA = wmma::fragment<wmma::matrix_a, kFragment, kFragment, kFragment,
                             typename MatrixElement<T>::type, wmma::row_major>;
template <typename T>
using ColumnsA = wmma::fragment<wmma::matrix_a, kFragment, kFragment, kFragment,
                                typename MatrixElement<T>::type, wmma::col_major>;
template <typename T>
using RowsB = wmma::fragment<wmma::matrix_b, kFragment, kFragment, kFragment,
                             typename MatrixElement<T>::type, wmma::row_major>;
template <typename T>
using ColumnsB = wmma::fragment<wmma::matrix_b, kFragment, kFragment, kFragment,
                                typename MatrixElement<T>::type, wmma::col_major>;
using Sums = wmma::fragment<wmma::accumulator, kFragment, kFragment, kFragment, float>;

/// Loads a fragment from a matrix in shared memory, at a multiple of 32 bytes, whose rows (or
/// columns) lie `stride` elements apart, a multiple of 8. All lanes of the warp must call it.
template <typename Fragment, typename T>
__device__ inline void load_fragment(Fragment& fragment, const T* data, int stride) {
  using Element = typename MatrixElement<T>::type;
  wmma::load_matrix_sync(fragment, reinterpret_cast<const Element*>(data),
                         static_cast<unsigned>(stride));
}

#ifdef __CUDACC__
// nvcc finds out that a matrix lies in shared memory and makes ldmatrix of it for f16, but not for
// bf16, which it would load word by word. So bf16 is told, with the instruction that
// load_matrix_sync stands for.
#define BITFALL_LOAD_FRAGMENT(Fragment, operand, layout)                                        \
  __device__ inline void load_fragment(Fragment<BFloat16>& fragment, const BFloat16* data,      \
                                       int stride) {                                            \
    auto* const words = reinterpret_cast<std::uint32_t*>(&fragment);                            \
    asm volatile("wmma.load." operand ".sync.aligned." layout                                   \
                 ".m16n16k16.shared.bf16 {%0, %1, %2, %3}, [%4], %5;"                           \
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])               \
                 : "r"(static_cast<std::uint32_t>(__cvta_generic_to_shared(data))), "r"(stride) \
                 : "memory");                                                                   \
  }
BITFALL_LOAD_FRAGMENT(RowsA, "a", "row")
BITFALL_LOAD_FRAGMENT(ColumnsA, "a", "col")
BITFALL_LOAD_FRAGMENT(RowsB, "b", "row")
BITFALL_LOAD_FRAGMENT(ColumnsB, "b", "col")
#undef BITFALL_LOAD_FRAGMENT
#endif

}  // namespace bitfall
