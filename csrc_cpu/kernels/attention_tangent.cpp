#include "csrc_cpu/kernels/attention_tangent.h"

#include "csrc_cpu/kernels/attention_dual.h"

namespace bitfall::BITFALL_ISA {
namespace {

// --- forward

template <typename Format>
struct ForwardBuffers {
  DualWords<Format> keys, values, queries;
  Dual<float*> scores;
  float* out;
  std::size_t bytes;

  ForwardBuffers(const Sizes<Format>& n, void* scratch) {
    using Word = typename Format::Word;
    Arena arena(scratch);
    keys = take_dual<Word>(arena, n.row_words * n.score_stride);
    values = take_dual<Word>(arena, n.depth_length * n.out_stride);
    queries = take_dual<Word>(arena, kBlockRows * n.row_words);
    scores = take_dual<float>(arena, kBlockRows * n.score_stride);
    out = arena.take<float>(kBlockRows * n.out_stride);
    bytes = arena.used();
  }
};

template <typename T>
struct Forward {
  using Format = typename WordsOf<T>::type;
  using Word = typename Format::Word;

  const AttentionHeadTangent& head;
  Sizes<Format> n;
  ForwardBuffers<Format> buffers;
  Dual<Rows<T>> queries, keys, values;
  float scale;

  Forward(const AttentionHeadTangent& head, void* scratch)
      : head(head),
        n(head.value.length, head.value.head_size),
        buffers(n, scratch),
        queries(dual_rows<T>(head, &AttentionHead::q, head.value.qkv_stride)),
        keys(dual_rows<T>(head, &AttentionHead::k, head.value.qkv_stride)),
        values(dual_rows<T>(head, &AttentionHead::v, head.value.qkv_stride)),
        scale(score_scale(head.value)) {}

  void run() {
    prefetch(queries, 0);
    pack_transposed<Format>(keys, n, buffers.keys);
    pack_across<Format>(values, 0, n.length, n.out_stride, buffers.values);
    for (std::int64_t first = 0; first < n.length; first += kBlockRows) {
      const std::int64_t rows = n.length - first < kBlockRows ? n.length - first : kBlockRows;
      scores_of(first, rows);
      prefetch(queries, first + rows);
      for (std::int64_t row = 0; row < rows; ++row) softmax_row(first + row, row * n.score_stride);
      multiply_by_product_rule<Format>(
          {nullptr, n.score_stride, 1, nullptr, n.out_stride, buffers.out, n.out_stride, rows,
           n.out_vectors, n.depth_length},
          {words(buffers.scores.value), words(buffers.scores.tangent)}, buffers.values);
      for (std::int64_t row = 0; row < rows; ++row) {
        write_row<Format>(
            buffers.out + row * n.out_stride, 1.0f, n.head_size,
            static_cast<T*>(head.tangent.out) + (first + row) * head.value.out_stride);
      }
    }
  }

  static Word* words(float* scores) { return reinterpret_cast<Word*>(scores); }

  /// Unscaled scores of a block of queries and their tangents.
  void scores_of(std::int64_t first, std::int64_t rows) {
    pack_along<Format>(queries, first, round_up(rows, kTileRows), n.row_words, buffers.queries);
    Product<Format> product{
        buffers.queries.value, n.row_words,    1,    buffers.keys.value, n.score_stride,
        buffers.scores.value,  n.score_stride, rows, n.score_vectors,    n.depth_head};
    multiply(product);
    product.c = buffers.scores.tangent;
    multiply_by_product_rule(product, buffers.queries, buffers.keys);
  }

  /// A row of scores at `offset` and its tangent become, in place, p = exp(score - log_sum_exp) and
  /// p (score_tangent - log_sum_exp_tangent), in the words of the next product.
  void softmax_row(std::int64_t query, std::int64_t offset) {
    float* scores = buffers.scores.value + offset;
    float* tangents = buffers.scores.tangent + offset;
    const std::int64_t columns = n.score_vectors * kLanes, at = query * head.value.lse_stride;
    mask_padding(scores, head.value.key_length, n.score_vectors);
    const Floats factor = broadcast(scale * kLog2E);
    const Floats shift = broadcast(-head.value.log_sum_exp[at] * kLog2E);
    Floats sums{};
    for (std::int64_t column = 0; column < columns; column += kLanes) {
      const Floats p = exp2(multiply_add(load(scores + column), factor, shift));
      store(scores + column, p);
      sums = multiply_add(p, load(tangents + column), sums);
    }
    const float log_sum_exp_tangent = sum(sums) * scale;
    head.tangent.log_sum_exp[at] = log_sum_exp_tangent;
    for (std::int64_t column = 0; column < columns; column += kLanes) {
      const Floats p = load(scores + column);
      const Floats change = load(tangents + column) * scale - log_sum_exp_tangent;
      Format::store_along(words(scores), column, p);
      Format::store_along(words(tangents), column, p * change);
    }
  }
};

// --- backward

template <typename Format>
struct BackwardBuffers {
  DualWords<Format> keys_transposed, values_transposed, keys;
  DualWords<Format> queries, douts, queries_across, douts_across;
  Dual<float*> scores, dprobabilities;
  float *dq, *dk, *dv;
  std::size_t bytes;

  BackwardBuffers(const Sizes<Format>& n, void* scratch) {
    using Word = typename Format::Word;
    Arena arena(scratch);
    keys_transposed = take_dual<Word>(arena, n.row_words * n.score_stride);
    values_transposed = take_dual<Word>(arena, n.row_words * n.score_stride);
    keys = take_dual<Word>(arena, n.depth_length * n.out_stride);
    queries = take_dual<Word>(arena, kBlockRows * n.row_words);
    douts = take_dual<Word>(arena, kBlockRows * n.row_words);
    queries_across = take_dual<Word>(arena, kBlockRows * n.out_stride);
    douts_across = take_dual<Word>(arena, kBlockRows * n.out_stride);
    scores = take_dual<float>(arena, kBlockRows * n.score_stride);
    dprobabilities = take_dual<float>(arena, kBlockRows * n.score_stride);
    dq = arena.take<float>(kBlockRows * n.out_stride);
    dk = arena.take<float>(n.tile_length * n.out_stride);
    dv = arena.take<float>(n.tile_length * n.out_stride);
    bytes = arena.used();
  }
};

/// What a row of scores needs: -log_sum_exp in powers of two, its tangent (not negated, natural),
/// and the inner product of dout and out with its tangent.
struct RowTerms {
  float shift, log_sum_exp_tangent, delta, delta_tangent;
};

template <typename T>
struct Backward {
  using Format = typename WordsOf<T>::type;
  using Word = typename Format::Word;
  static constexpr int kPerWord = Format::kPerWord;

  const AttentionHeadTangent& head;
  Sizes<Format> n;
  BackwardBuffers<Format> buffers;
  Dual<Rows<T>> queries, keys, values, outs, douts;
  float scale;
  RowTerms terms[kBlockRows];

  Backward(const AttentionHeadTangent& head, void* scratch)
      : head(head),
        n(head.value.length, head.value.head_size),
        buffers(n, scratch),
        queries(dual_rows<T>(head, &AttentionHead::q, head.value.qkv_stride)),
        keys(dual_rows<T>(head, &AttentionHead::k, head.value.qkv_stride)),
        values(dual_rows<T>(head, &AttentionHead::v, head.value.qkv_stride)),
        outs{rows_of<T>(head.value.out, head.value.out_stride, head.value),
             rows_of<T>(head.tangent.out, head.value.out_stride, head.value)},
        douts(dual_rows<T>(head, &AttentionHead::dout, head.value.out_stride)),
        scale(score_scale(head.value)) {}

  void run() {
    prefetch_rows(0);
    pack_transposed<Format>(keys, n, buffers.keys_transposed);
    pack_transposed<Format>(values, n, buffers.values_transposed);
    pack_across<Format>(keys, 0, n.length, n.out_stride, buffers.keys);
    for (std::int64_t first = 0; first < n.length; first += kBlockRows) {
      const std::int64_t rows = n.length - first < kBlockRows ? n.length - first : kBlockRows;
      row_terms(first, rows);
      scores_of(first, rows);
      prefetch_rows(first + rows);
      for (std::int64_t row = 0; row < rows; row += kPerWord) softmax_rows(row);
      gradients_of(first, rows);
    }
    write_rows(buffers.dk, scale, 0, n.length, head.tangent.dk);
    write_rows(buffers.dv, 1.0f, 0, n.length, head.tangent.dv);
  }

  void write_rows(const float* source, float factor, std::int64_t first, std::int64_t rows,
                  void* destination) const {
    for (std::int64_t row = 0; row < rows; ++row) {
      write_row<Format>(source + row * n.out_stride, factor, n.head_size,
                        static_cast<T*>(destination) + (first + row) * head.value.qkv_stride);
    }
  }

  void prefetch_rows(std::int64_t first) const {
    for (const Dual<Rows<T>>& rows : {douts, outs, queries}) prefetch(rows, first);
  }

  /// All rows of a block at once, so that their cache misses overlap.
  void row_terms(std::int64_t first, std::int64_t rows) {
    for (std::int64_t row = 0; row < round_up(rows, kPerWord); ++row) {
      const std::int64_t query = first + row, at = query * head.value.lse_stride;
      Floats sums{}, tangents{};
      for (std::int64_t column = 0; column < n.head_size; column += kLanes) {
        const Floats dout = douts.value.at(query, column), out = outs.value.at(query, column);
        sums = multiply_add(dout, out, sums);
        tangents = multiply_add(douts.tangent.at(query, column), out, tangents);
        tangents = multiply_add(dout, outs.tangent.at(query, column), tangents);
      }
      terms[row] = {0.0f, 0.0f, sum(sums), sum(tangents)};
      if (row >= rows) continue;
      terms[row].shift = -head.value.log_sum_exp[at] * kLog2E;
      terms[row].log_sum_exp_tangent = head.tangent.log_sum_exp[at];
    }
  }

  /// scores = q k^T and dprobabilities = dout v^T for a block of queries, and their tangents.
  /// Padding rows are zero and so add nothing to any gradient.
  void scores_of(std::int64_t first, std::int64_t rows) {
    const std::int64_t tile_rows = round_up(rows, kTileRows);
    pack_along<Format>(queries, first, tile_rows, n.row_words, buffers.queries);
    pack_along<Format>(douts, first, tile_rows, n.row_words, buffers.douts);
    pack_across<Format>(queries, first, rows, n.out_stride, buffers.queries_across);
    pack_across<Format>(douts, first, rows, n.out_stride, buffers.douts_across);
    multiply_dual(buffers.queries, buffers.keys_transposed, buffers.scores, rows);
    multiply_dual(buffers.douts, buffers.values_transposed, buffers.dprobabilities, rows);
  }

  void multiply_dual(const DualWords<Format>& a, const DualWords<Format>& b, const Dual<float*>& c,
                     std::int64_t rows) const {
    Product<Format> product{a.value, n.row_words,    1,    b.value,         n.score_stride,
                            c.value, n.score_stride, rows, n.score_vectors, n.depth_head};
    multiply(product);
    product.c = c.tangent;
    multiply_by_product_rule(product, a, b);
  }

  static Word* words(float* scores) { return reinterpret_cast<Word*>(scores); }
  // f32 words run along and across alike. Of pairs, those across take two rows of scores: one for
  // the quantity, one for its tangent.
  DualWords<Format> probabilities_across() const {
    return {words(buffers.scores.value),
            words(kPerWord == 1 ? buffers.scores.tangent : buffers.scores.value + n.score_stride)};
  }
  DualWords<Format> dscores_across() const {
    float* pairs = buffers.scores.tangent;
    return {words(kPerWord == 1 ? buffers.dprobabilities.value : pairs),
            words(kPerWord == 1 ? buffers.dprobabilities.tangent : pairs + n.score_stride)};
  }
  DualWords<Format> dscores_along() const {
    return {words(buffers.dprobabilities.value), words(buffers.dprobabilities.tangent)};
  }

  /// kPerWord rows of scores and dprobabilities, with their tangents, become, in place, the
  /// probabilities p and dscores = p (dp - delta), with their tangents, as words for the next
  /// products.
  void softmax_rows(std::int64_t row) {
    const std::int64_t offset = row * n.score_stride;
    for (int i = 0; i < kPerWord; ++i) {
      mask_padding(buffers.scores.value + offset + i * n.score_stride, head.value.key_length,
                   n.score_vectors);
    }
    const Floats factor = broadcast(scale * kLog2E);
    for (std::int64_t column = 0; column < n.score_vectors * kLanes; column += kLanes) {
      Dual<Floats[kPerWord]> p, dscores;
#pragma GCC unroll 2
      for (int i = 0; i < kPerWord; ++i) {
        const std::int64_t at = offset + i * n.score_stride + column;
        const RowTerms& row_terms = terms[row + i];
        const Floats change =
            load(buffers.scores.tangent + at) * scale - row_terms.log_sum_exp_tangent;
        const Floats dp = load(buffers.dprobabilities.value + at) - row_terms.delta;
        const Floats dp_tangent =
            load(buffers.dprobabilities.tangent + at) - row_terms.delta_tangent;
        p.value[i] =
            exp2(multiply_add(load(buffers.scores.value + at), factor, broadcast(row_terms.shift)));
        p.tangent[i] = p.value[i] * change;
        dscores.value[i] = p.value[i] * dp;
        dscores.tangent[i] = multiply_add(p.tangent[i], dp, p.value[i] * dp_tangent);
      }
      store_across(probabilities_across(), offset + column, p);
      store_across(dscores_across(), offset + column, dscores);
      if constexpr (kPerWord > 1) {
        for (int i = 0; i < kPerWord; ++i) {
          const std::int64_t first = offset + i * n.score_stride;
          Format::store_along(dscores_along().value + first, column, dscores.value[i]);
          Format::store_along(dscores_along().tangent + first, column, dscores.tangent[i]);
        }
      }
    }
  }

  static BITFALL_INLINE void store_across(const DualWords<Format>& destination, std::int64_t at,
                                          const Dual<Floats[kPerWord]>& x) {
    Format::store_across(destination.value + at, x.value);
    Format::store_across(destination.tangent + at, x.tangent);
  }

  /// The tangents of: dq of the block = dscores k; dk += dscores^T q; dv += probabilities^T dout.
  void gradients_of(std::int64_t first, std::int64_t rows) {
    multiply_by_product_rule<Format>({nullptr, n.score_stride, 1, nullptr, n.out_stride, buffers.dq,
                                      n.out_stride, rows, n.out_vectors, n.depth_length},
                                     dscores_along(), buffers.keys);
    write_rows(buffers.dq, scale, first, rows, head.tangent.dq);
    Product<Format> over_rows{nullptr,
                              1,
                              kPerWord * n.score_stride,
                              nullptr,
                              n.out_stride,
                              buffers.dk,
                              n.out_stride,
                              n.length,
                              n.out_vectors,
                              round_up(rows, kPerWord) / kPerWord,
                              first == 0 ? Accumulate::no : Accumulate::yes};
    multiply_by_product_rule(over_rows, dscores_across(), buffers.queries_across);
    over_rows.c = buffers.dv;
    multiply_by_product_rule(over_rows, probabilities_across(), buffers.douts_across);
  }
};

// --- the table

void forward(DType dtype, const AttentionHeadTangent& head, void* scratch) {
  dispatch(dtype, [&](auto tag) { Forward<typename decltype(tag)::type>(head, scratch).run(); });
}

void backward(DType dtype, const AttentionHeadTangent& head, void* scratch) {
  dispatch(dtype, [&](auto tag) { Backward<typename decltype(tag)::type>(head, scratch).run(); });
}

}  // namespace

extern const AttentionTangentKernels attention_tangent_kernels;
const AttentionTangentKernels attention_tangent_kernels{
    scratch_bytes<ForwardBuffers>, scratch_bytes<BackwardBuffers>, forward, backward};

}  // namespace bitfall::BITFALL_ISA
