// Operands of attention together with their tangents: packing, and products by the product rule.
#pragma once

#include "csrc_cpu/kernels/attention_parts.h"
#include "csrc_cpu/kernels/attention_tangent.h"

namespace bitfall::BITFALL_ISA {
namespace {

/// A quantity and its tangent.
template <typename X>
struct Dual {
  X value, tangent;
};

template <typename Format>
using DualWords = Dual<typename Format::Word*>;

/// c (+)= a_tangent b + a b_tangent: the product rule. `p` says the sizes and c.
template <typename Format>
void multiply_by_product_rule(Product<Format> p, const DualWords<Format>& a,
                              const DualWords<Format>& b) {
  p.a = a.tangent;
  p.b = b.value;
  multiply(p);
  p.a = a.value;
  p.b = b.tangent;
  p.accumulate = Accumulate::yes;
  multiply(p);
}

template <typename X>
Dual<X*> take_dual(Arena& arena, std::int64_t count) {
  X* value = arena.take<X>(count);
  return {value, arena.take<X>(count)};
}

template <typename T>
Dual<Rows<T>> dual_rows(const AttentionHeadTangent& head, const void* AttentionHead::*first,
                        std::int64_t stride) {
  return {rows_of<T>(head.value.*first, stride, head.value),
          rows_of<T>(head.tangent.*first, stride, head.value)};
}

// Both members packed: see the functions of attention_tiles.h.

template <typename Format, typename T>
void pack_along(const Dual<Rows<T>>& source, std::int64_t begin, std::int64_t rows,
                std::int64_t row_words, const DualWords<Format>& words) {
  pack_along<Format>(source.value, begin, rows, row_words, words.value);
  pack_along<Format>(source.tangent, begin, rows, row_words, words.tangent);
}

template <typename Format, typename T>
void pack_across(const Dual<Rows<T>>& source, std::int64_t begin, std::int64_t rows,
                 std::int64_t row_words, const DualWords<Format>& words) {
  pack_across<Format>(source.value, begin, rows, row_words, words.value);
  pack_across<Format>(source.tangent, begin, rows, row_words, words.tangent);
}

template <typename Format, typename T>
void pack_transposed(const Dual<Rows<T>>& source, const Sizes<Format>& n,
                     const DualWords<Format>& words) {
  pack_transposed<Format>(source.value, n.row_words, n.score_stride, words.value);
  pack_transposed<Format>(source.tangent, n.row_words, n.score_stride, words.tangent);
}

template <typename T>
void prefetch(const Dual<Rows<T>>& rows, std::int64_t begin) {
  rows.value.prefetch(begin, begin + kBlockRows);
  rows.tangent.prefetch(begin, begin + kBlockRows);
}

}  // namespace
}  // namespace bitfall::BITFALL_ISA
