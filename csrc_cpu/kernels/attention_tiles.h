// Small matrix products for attention: operand formats, packing and the register-blocked tile.
//
// Operands are matrices of 32-bit words. A word holds one f32 element or, where the instruction set
// multiplies bf16 pairs (AVX512_BF16), two neighbours along the summed dimension, so both formats
// share all loops. Products sum in f32, in an order that depends on the sizes alone.
#pragma once

#include <cstdint>

#include "core/backend.h"
#include "csrc_cpu/kernels/vector.h"

namespace bitfall::BITFALL_ISA {
namespace {

constexpr std::int64_t round_up(std::int64_t value, std::int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

/// A matrix of any dtype: `count` rows of `columns` elements, `stride` elements apart.
template <typename T>
struct Rows {
  const T* first;
  std::int64_t stride;
  std::int64_t count;
  std::int64_t columns;

  /// Columns [column, column + kLanes) of a row; zeros outside the matrix.
  BITFALL_INLINE Floats at(std::int64_t row, std::int64_t column) const {
    if (row >= count || column >= columns) return Floats{};
    return load_lanes(first + row * stride + column, columns - column);
  }
  /// Starts to fetch rows [begin, end): far apart in memory, they escape the hardware's prediction.
  BITFALL_INLINE void prefetch(std::int64_t begin, std::int64_t end) const {
    const std::int64_t bytes = columns * static_cast<std::int64_t>(sizeof(T));
    for (std::int64_t row = begin; row < end && row < count; ++row) {
      const char* source = reinterpret_cast<const char*>(first + row * stride);
      for (std::int64_t byte = 0; byte < bytes; byte += 64) __builtin_prefetch(source + byte);
    }
  }
};

struct F32Words {
  using Word = float;
  static constexpr int kPerWord = 1;

  static BITFALL_INLINE Floats multiply_add(Word a, Floats b, Floats sums) {
    return BITFALL_ISA::multiply_add(broadcast(a), b, sums);
  }
  /// kLanes words from `column` on that run along a row; zeros outside the matrix.
  template <typename T>
  static BITFALL_INLINE Words load_along(const Rows<T>& rows, std::int64_t row,
                                         std::int64_t column) {
    return reinterpret_cast<Words>(rows.at(row, column));
  }
  /// Elements [column, column + kLanes) of a row whose words run along the row.
  static BITFALL_INLINE void store_along(Word* row, std::int64_t column, Floats x) {
    store(row + column, x);
  }
  /// kPerWord rows as words that run across them.
  static BITFALL_INLINE void store_across(Word* words, const Floats* rows) {
    store(words, rows[0]);
  }
  /// kLanes elements of a result.
  template <typename T>
  static BITFALL_INLINE void store_elements(T* destination, Floats x) {
    store(destination, x);
  }
};

template <typename T>
struct WordsOf {
  using type = F32Words;
};

#if defined(__AVX512BF16__)
/// The conversions here flush subnormals, as the products do.
struct Bf16Pairs {
  using Word = std::uint32_t;
  static constexpr int kPerWord = 2;

  static BITFALL_INLINE Floats multiply_add(Word a, Floats b, Floats sums) {
    const Words pair = a - Words{};
    return _mm512_dpbf16_ps(sums, reinterpret_cast<__m512bh>(pair), reinterpret_cast<__m512bh>(b));
  }
  static BITFALL_INLINE Words load_along(const Rows<BFloat16>& rows, std::int64_t row,
                                         std::int64_t column) {
    if (row >= rows.count || column >= rows.columns) return Words{};
    const std::int64_t left = rows.columns - column;
    const __mmask32 mask = left >= 32 ? ~0u : (1u << left) - 1;
    return reinterpret_cast<Words>(
        _mm512_maskz_loadu_epi16(mask, rows.first + row * rows.stride + column));
  }
  static BITFALL_INLINE void store_along(Word* row, std::int64_t column, Floats x) {
    store_elements(reinterpret_cast<BFloat16*>(row) + column, x);
  }
  static BITFALL_INLINE void store_across(Word* words, const Floats* rows) {
    typedef std::uint16_t Halves __attribute__((vector_size(64)));
    const Halves x = reinterpret_cast<Halves>(_mm512_cvtne2ps_pbh(rows[1], rows[0]));
    const Halves mixed =
        __builtin_shufflevector(x, x, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23, 8, 24,
                                9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
    __builtin_memcpy(words, &mixed, sizeof(mixed));
  }
  static BITFALL_INLINE void store_elements(BFloat16* destination, Floats x) {
    const __m256bh halves = _mm512_cvtneps_pbh(x);
    __builtin_memcpy(destination, &halves, sizeof(halves));
  }
};

template <>
struct WordsOf<BFloat16> {
  using type = Bf16Pairs;
};
#endif

// --- packing

/// `rows` rows from `begin`, words along the row, `row_words` (a multiple of kLanes) each.
template <typename Format, typename T>
void pack_along(const Rows<T>& source, std::int64_t begin, std::int64_t rows,
                std::int64_t row_words, typename Format::Word* words) {
  for (std::int64_t row = 0; row < rows; ++row) {
    for (std::int64_t word = 0; word < row_words; word += kLanes) {
      const Words x = Format::load_along(source, begin + row, word * Format::kPerWord);
      __builtin_memcpy(words + row * row_words + word, &x, sizeof(x));
    }
  }
}

/// Rows [begin, begin + rows), kPerWord of them in each row of words, `row_words` (the columns
/// rounded up to kLanes) apart.
template <typename Format, typename T>
void pack_across(const Rows<T>& source, std::int64_t begin, std::int64_t rows,
                 std::int64_t row_words, typename Format::Word* words) {
  for (std::int64_t row = 0; row < rows; row += Format::kPerWord) {
    for (std::int64_t column = 0; column < row_words; column += kLanes) {
      Floats group[Format::kPerWord];
      for (int i = 0; i < Format::kPerWord; ++i) group[i] = source.at(begin + row + i, column);
      Format::store_across(words + row / Format::kPerWord * row_words + column, group);
    }
  }
}

/// Transposes kLanes x kLanes words: log2(kLanes) exchanges of ever smaller off-diagonal squares.
BITFALL_INLINE void transpose_square(Words (&row)[kLanes]) {
#pragma GCC unroll 4
  for (int size = kLanes / 2; size > 0; size /= 2) {
    Words upper, lower;
    for (int lane = 0; lane < kLanes; ++lane) {
      upper[lane] = static_cast<unsigned>((lane & size) != 0 ? lane - size + kLanes : lane);
      lower[lane] = static_cast<unsigned>((lane & size) != 0 ? lane + kLanes : lane + size);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
      if ((i & size) != 0) continue;
      const Words a = row[i], b = row[i + size];
      row[i] = __builtin_shuffle(a, b, upper);
      row[i + size] = __builtin_shuffle(a, b, lower);
    }
  }
}

/// The transpose: word (c, s) holds the columns [c * kPerWord, (c + 1) * kPerWord) of row s.
/// `words` [depth, stride], depth a multiple of kLanes.
template <typename Format, typename T>
void pack_transposed(const Rows<T>& source, std::int64_t depth, std::int64_t stride,
                     typename Format::Word* words) {
  for (std::int64_t first = 0; first < source.count; first += kLanes) {
    for (std::int64_t c = 0; c < depth; c += kLanes) {
      Words row[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) {
        row[i] = Format::load_along(source, first + i, c * Format::kPerWord);
      }
      transpose_square(row);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) {
        __builtin_memcpy(words + (c + i) * stride + first, &row[i], sizeof(Words));
      }
    }
  }
}

// --- products

constexpr int kTileRows = kLanes == 16 ? 8 : 4;  ///< with kTileVectors fills the registers
constexpr int kTileVectors = kLanes == 4 ? 2 : 3;

/// c [rows, vectors * kLanes] (+)= a [rows, depth] b [depth, vectors * kLanes], in words. Rows are
/// computed in tiles: a and c need memory for `rows` rounded up to kTileRows.
template <typename Format>
struct Product {
  const typename Format::Word* a;
  std::int64_t a_row_stride, a_depth_stride;
  const typename Format::Word* b;
  std::int64_t b_stride;
  float* c;
  std::int64_t c_stride;
  std::int64_t rows, vectors, depth;
  Accumulate accumulate = Accumulate::no;
};

template <int tile_rows, int tile_vectors, typename Format>
BITFALL_INLINE void multiply_tile(const Product<Format>& p, std::int64_t row, std::int64_t vector) {
  const typename Format::Word* a = p.a + row * p.a_row_stride;
  const typename Format::Word* b = p.b + vector * kLanes;
  float* c = p.c + row * p.c_stride + vector * kLanes;
  Floats sums[tile_rows][tile_vectors];
#pragma GCC unroll 8
  for (int i = 0; i < tile_rows; ++i) {
#pragma GCC unroll 3
    for (int j = 0; j < tile_vectors; ++j) {
      sums[i][j] =
          p.accumulate == Accumulate::yes ? load(c + i * p.c_stride + j * kLanes) : Floats{};
    }
  }
#pragma GCC unroll 1
  for (std::int64_t k = 0; k < p.depth; ++k) {
    Floats columns[tile_vectors];
#pragma GCC unroll 3
    for (int j = 0; j < tile_vectors; ++j) {
      __builtin_memcpy(&columns[j], b + k * p.b_stride + j * kLanes, sizeof(Floats));
    }
#pragma GCC unroll 8
    for (int i = 0; i < tile_rows; ++i) {
      const typename Format::Word element = a[i * p.a_row_stride + k * p.a_depth_stride];
#pragma GCC unroll 3
      for (int j = 0; j < tile_vectors; ++j) {
        sums[i][j] = Format::multiply_add(element, columns[j], sums[i][j]);
      }
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < tile_rows; ++i) {
#pragma GCC unroll 3
    for (int j = 0; j < tile_vectors; ++j) {
      store(c + i * p.c_stride + j * kLanes, sums[i][j]);
    }
  }
}

template <int tile_rows, typename Format>
BITFALL_INLINE void multiply_row_tile(const Product<Format>& p, std::int64_t row) {
  std::int64_t vector = 0;
  while (vector < p.vectors) {
    const std::int64_t left = p.vectors - vector;
    if constexpr (kTileVectors == 3) {
      // Four are two twos, not three and one.
      if (left == 3 || left > 4) {
        multiply_tile<tile_rows, 3>(p, row, vector);
        vector += 3;
        continue;
      }
    }
    if (left >= 2) {
      multiply_tile<tile_rows, 2>(p, row, vector);
      vector += 2;
    } else {
      multiply_tile<tile_rows, 1>(p, row, vector);
      vector += 1;
    }
  }
}

template <typename Format>
void multiply(const Product<Format>& product) {
  const Product<Format> p = product;  // a copy that no store can alias
  std::int64_t row = 0;
  while (row < p.rows) {
    if (p.rows - row > kTileRows / 2) {
      multiply_row_tile<kTileRows>(p, row);
      row += kTileRows;
    } else {
      multiply_row_tile<kTileRows / 2>(p, row);
      row += kTileRows / 2;
    }
  }
}

}  // namespace
}  // namespace bitfall::BITFALL_ISA
