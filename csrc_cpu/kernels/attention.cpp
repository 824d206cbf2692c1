#include "csrc_cpu/kernels/attention.h"

#include "csrc_cpu/kernels/attention_parts.h"

namespace bitfall::BITFALL_ISA {
namespace {

// --- forward

template <typename Format>
struct ForwardBuffers {
  typename Format::Word *keys, *values, *queries;
  float *scores, *out;
  std::size_t bytes;

  ForwardBuffers(const Sizes<Format>& n, void* scratch) {
    using Word = typename Format::Word;
    Arena arena(scratch);
    keys = arena.take<Word>(n.row_words * n.score_stride);
    values = arena.take<Word>(n.depth_length * n.out_stride);
    queries = arena.take<Word>(kBlockRows * n.row_words);
    scores = arena.take<float>(kBlockRows * n.score_stride);
    out = arena.take<float>(kBlockRows * n.out_stride);
    bytes = arena.used();
  }
};

struct RowSoftmax {
  float log_sum_exp;
  float inverse_sum;
};

/// scores [S] become exp(scale * (score - max)) times the dropout multipliers, in the words of the
/// next product, in place.
template <typename Format>
RowSoftmax softmax_row(float* scores, std::int64_t vectors, float scale, std::int64_t query,
                       Multipliers& multipliers) {
  Floats largest = load(scores);
  for (std::int64_t j = 1; j < vectors; ++j) largest = max(largest, load(scores + j * kLanes));
  const float row_max = largest_lane(largest);
  const Floats factor = broadcast(scale * kLog2E), shift = broadcast(-row_max * scale * kLog2E);
  Floats sums{};
  for (std::int64_t column = 0; column < vectors * kLanes; column += kLanes) {
    if (column % kDropoutBlock == 0) multipliers.compute(query, column / kDropoutBlock);
    const Floats p = exp2(multiply_add(load(scores + column), factor, shift));
    sums += p;
    Format::store_along(reinterpret_cast<typename Format::Word*>(scores), column,
                        p * multipliers.at(column));
  }
  const float total = sum(sums);
  return {row_max * scale + __builtin_logf(total), 1.0f / total};
}

template <typename T>
void forward_head(const AttentionHead& head, void* scratch) {
  using Format = typename WordsOf<T>::type;
  using Word = typename Format::Word;
  const Sizes<Format> n(head.length, head.head_size);
  const ForwardBuffers<Format> buffers(n, scratch);
  const Rows<T> queries = rows_of<T>(head.q, head.qkv_stride, head);
  const Rows<T> values = rows_of<T>(head.v, head.qkv_stride, head);
  values.prefetch(0, n.length);
  queries.prefetch(0, kBlockRows);
  pack_transposed<Format>(rows_of<T>(head.k, head.qkv_stride, head), n.row_words, n.score_stride,
                          buffers.keys);
  pack_across<Format>(values, 0, n.length, n.out_stride, buffers.values);
  const float scale = score_scale(head);
  Multipliers multipliers(head);
  for (std::int64_t first = 0; first < n.length; first += kBlockRows) {
    const std::int64_t rows = n.length - first < kBlockRows ? n.length - first : kBlockRows;
    pack_along<Format>(queries, first, round_up(rows, kTileRows), n.row_words, buffers.queries);
    queries.prefetch(first + rows, first + rows + kBlockRows);
    multiply<Format>({buffers.queries, n.row_words, 1, buffers.keys, n.score_stride, buffers.scores,
                      n.score_stride, rows, n.score_vectors, n.depth_head});
    float inverse_sums[kBlockRows];
    for (std::int64_t row = 0; row < rows; ++row) {
      float* scores = buffers.scores + row * n.score_stride;
      mask_padding(scores, head.key_length, n.score_vectors);
      const RowSoftmax result =
          softmax_row<Format>(scores, n.score_vectors, scale, first + row, multipliers);
      head.log_sum_exp[(first + row) * head.lse_stride] = result.log_sum_exp;
      inverse_sums[row] = result.inverse_sum;
    }
    multiply<Format>({reinterpret_cast<const Word*>(buffers.scores), n.score_stride, 1,
                      buffers.values, n.out_stride, buffers.out, n.out_stride, rows, n.out_vectors,
                      n.depth_length});
    for (std::int64_t row = 0; row < rows; ++row) {
      write_row<Format>(buffers.out + row * n.out_stride, inverse_sums[row], n.head_size,
                        static_cast<T*>(head.out) + (first + row) * head.out_stride);
    }
  }
}

// --- backward

template <typename Format>
struct BackwardBuffers {
  typename Format::Word *keys_transposed, *values_transposed, *keys;
  typename Format::Word *queries, *douts, *queries_across, *douts_across;
  float *scores, *dprobabilities, *dq, *dk, *dv;
  std::size_t bytes;

  BackwardBuffers(const Sizes<Format>& n, void* scratch) {
    using Word = typename Format::Word;
    Arena arena(scratch);
    keys_transposed = arena.take<Word>(n.row_words * n.score_stride);
    values_transposed = arena.take<Word>(n.row_words * n.score_stride);
    keys = arena.take<Word>(n.depth_length * n.out_stride);
    queries = arena.take<Word>(kBlockRows * n.row_words);
    douts = arena.take<Word>(kBlockRows * n.row_words);
    queries_across = arena.take<Word>(kBlockRows * n.out_stride);
    douts_across = arena.take<Word>(kBlockRows * n.out_stride);
    scores = arena.take<float>(kBlockRows * n.score_stride);
    dprobabilities = arena.take<float>(kBlockRows * n.score_stride);
    dq = arena.take<float>(kBlockRows * n.out_stride);
    dk = arena.take<float>(n.tile_length * n.out_stride);
    dv = arena.take<float>(n.tile_length * n.out_stride);
    bytes = arena.used();
  }
};

template <typename T>
struct Backward {
  using Format = typename WordsOf<T>::type;
  using Word = typename Format::Word;
  static constexpr int kPerWord = Format::kPerWord;

  const AttentionHead& head;
  Sizes<Format> n;
  BackwardBuffers<Format> buffers;
  Rows<T> queries, keys, values, outs, douts;
  Multipliers multipliers[2];
  float scale;
  float shifts[kBlockRows], deltas[kBlockRows];

  Backward(const AttentionHead& head, void* scratch)
      : head(head),
        n(head.length, head.head_size),
        buffers(n, scratch),
        queries(rows_of<T>(head.q, head.qkv_stride, head)),
        keys(rows_of<T>(head.k, head.qkv_stride, head)),
        values(rows_of<T>(head.v, head.qkv_stride, head)),
        outs(rows_of<T>(head.out, head.out_stride, head)),
        douts(rows_of<T>(head.dout, head.out_stride, head)),
        multipliers{Multipliers(head), Multipliers(head)},
        scale(score_scale(head)) {}

  void run() {
    prefetch_rows(0);
    pack_transposed<Format>(keys, n.row_words, n.score_stride, buffers.keys_transposed);
    pack_transposed<Format>(values, n.row_words, n.score_stride, buffers.values_transposed);
    pack_across<Format>(keys, 0, n.length, n.out_stride, buffers.keys);
    for (std::int64_t first = 0; first < n.length; first += kBlockRows) {
      const std::int64_t rows = n.length - first < kBlockRows ? n.length - first : kBlockRows;
      row_terms(first, rows);
      scores_of(first, rows);
      prefetch_rows(first + rows);
      for (std::int64_t row = 0; row < rows; row += kPerWord) softmax_rows(first, row);
      gradients_of(first, rows);
    }
    for (std::int64_t row = 0; row < n.length; ++row) {
      write_row<Format>(buffers.dk + row * n.out_stride, scale, n.head_size,
                        static_cast<T*>(head.dk) + row * head.qkv_stride);
      write_row<Format>(buffers.dv + row * n.out_stride, 1.0f, n.head_size,
                        static_cast<T*>(head.dv) + row * head.qkv_stride);
    }
  }

  /// scores = q k^T and dprobabilities = dout v^T for a block of queries. Padding rows have
  /// q = dout = 0 and so add nothing to any gradient.
  void scores_of(std::int64_t first, std::int64_t rows) {
    const std::int64_t tile_rows = round_up(rows, kTileRows);
    pack_along<Format>(queries, first, tile_rows, n.row_words, buffers.queries);
    pack_along<Format>(douts, first, tile_rows, n.row_words, buffers.douts);
    pack_across<Format>(queries, first, rows, n.out_stride, buffers.queries_across);
    pack_across<Format>(douts, first, rows, n.out_stride, buffers.douts_across);
    multiply<Format>({buffers.queries, n.row_words, 1, buffers.keys_transposed, n.score_stride,
                      buffers.scores, n.score_stride, rows, n.score_vectors, n.depth_head});
    multiply<Format>({buffers.douts, n.row_words, 1, buffers.values_transposed, n.score_stride,
                      buffers.dprobabilities, n.score_stride, rows, n.score_vectors, n.depth_head});
  }

  void prefetch_rows(std::int64_t first) const {
    for (const Rows<T>& rows : {douts, outs, queries}) rows.prefetch(first, first + kBlockRows);
  }

  /// What the rows of a block need: -log_sum_exp in powers of two and the inner product of dout and
  /// out. All rows at once, so that their cache misses overlap.
  void row_terms(std::int64_t first, std::int64_t rows) {
    for (std::int64_t row = 0; row < round_up(rows, kPerWord); ++row) {
      const std::int64_t query = first + row;
      Floats sums{};
      for (std::int64_t column = 0; column < n.head_size; column += kLanes) {
        sums = multiply_add(douts.at(query, column), outs.at(query, column), sums);
      }
      deltas[row] = sum(sums);
      shifts[row] = row < rows ? -head.log_sum_exp[query * head.lse_stride] * kLog2E : 0.0f;
    }
  }

  Word* probabilities_across() const { return reinterpret_cast<Word*>(buffers.scores); }
  /// f32 words run along and across alike; of pairs, the second form takes the odd rows of scores.
  Word* dscores_across() const {
    return reinterpret_cast<Word*>(kPerWord == 1 ? buffers.dprobabilities
                                                 : buffers.scores + n.score_stride);
  }

  /// kPerWord rows of scores and dprobabilities become, in place, probabilities p (with dropout)
  /// and dscores = p (dropout(dp) - delta) as words for the next products.
  void softmax_rows(std::int64_t first, std::int64_t row) {
    const Floats factor = broadcast(scale * kLog2E);
    const std::int64_t stride = n.score_stride, columns = n.score_vectors * kLanes;
    float* scores = buffers.scores + row * stride;
    float* dprobabilities = buffers.dprobabilities + row * stride;
    Word* across = probabilities_across() + row * stride;
    Word* dscores_words = dscores_across() + row * stride;
    for (int i = 0; i < kPerWord; ++i) {
      mask_padding(scores + i * stride, head.key_length, n.score_vectors);
    }
    for (std::int64_t column = 0; column < columns; column += kLanes) {
      Floats kept[kPerWord], dscores[kPerWord];
#pragma GCC unroll 2
      for (int i = 0; i < kPerWord; ++i) {
        if (column % kDropoutBlock == 0) {
          multipliers[i].compute(first + row + i, column / kDropoutBlock);
        }
        const Floats shift = broadcast(shifts[row + i]), delta = broadcast(deltas[row + i]);
        const Floats p = exp2(multiply_add(load(scores + i * stride + column), factor, shift));
        const Floats multiplier = multipliers[i].at(column);
        kept[i] = p * multiplier;
        dscores[i] = p * (load(dprobabilities + i * stride + column) * multiplier - delta);
      }
      Format::store_across(across + column, kept);
      Format::store_across(dscores_words + column, dscores);
      if constexpr (kPerWord > 1) {
        for (int i = 0; i < kPerWord; ++i) {
          Format::store_along(reinterpret_cast<Word*>(dprobabilities + i * stride), column,
                              dscores[i]);
        }
      }
    }
  }

  /// dq of the block = dscores k; dk += dscores^T q; dv += probabilities^T dout.
  void gradients_of(std::int64_t first, std::int64_t rows) {
    multiply<Format>({reinterpret_cast<const Word*>(buffers.dprobabilities), n.score_stride, 1,
                      buffers.keys, n.out_stride, buffers.dq, n.out_stride, rows, n.out_vectors,
                      n.depth_length});
    for (std::int64_t row = 0; row < rows; ++row) {
      write_row<Format>(buffers.dq + row * n.out_stride, scale, n.head_size,
                        static_cast<T*>(head.dq) + (first + row) * head.qkv_stride);
    }
    const std::int64_t depth_rows = round_up(rows, kPerWord) / kPerWord;
    const Accumulate accumulate = first == 0 ? Accumulate::no : Accumulate::yes;
    multiply<Format>({dscores_across(), 1, kPerWord * n.score_stride, buffers.queries_across,
                      n.out_stride, buffers.dk, n.out_stride, n.length, n.out_vectors, depth_rows,
                      accumulate});
    multiply<Format>({probabilities_across(), 1, kPerWord * n.score_stride, buffers.douts_across,
                      n.out_stride, buffers.dv, n.out_stride, n.length, n.out_vectors, depth_rows,
                      accumulate});
  }
};

// --- the table

void forward(DType dtype, const AttentionHead& head, void* scratch) {
  dispatch(dtype, [&](auto tag) { forward_head<typename decltype(tag)::type>(head, scratch); });
}

void backward(DType dtype, const AttentionHead& head, void* scratch) {
  dispatch(dtype, [&](auto tag) { Backward<typename decltype(tag)::type>(head, scratch).run(); });
}

}  // namespace

extern const AttentionKernels attention_kernels;
const AttentionKernels attention_kernels{scratch_bytes<ForwardBuffers>,
                                         scratch_bytes<BackwardBuffers>, forward, backward};

}  // namespace bitfall::BITFALL_ISA
