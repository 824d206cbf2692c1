// What every attention kernel is told, and how its blocks find their part of a packed batch.
#pragma once

#include <cstdint>

#include "csrc_cuda/element.cuh"

namespace bitfall {

struct AttentionProblem {
  const std::int32_t* starts;       ///< [B+1]
  const std::int32_t* key_lengths;  ///< [B] or null
  const std::int32_t* sample_keys;  ///< [B], read if dropout is on
  std::int64_t tokens, sequences;
  std::int64_t heads, head_size;
  float scale;  ///< of the scores
  Dropout dropout;

  __host__ __device__ std::int64_t hidden_size() const { return heads * head_size; }
};

/// Rows [first, ...) of one sequence, for one block.
struct SequencePart {
  std::int64_t row;        ///< of the sequence's first token
  int length, key_length;  ///< tokens, and how many of them are attended to
  int first;               ///< first token of the part; `length` or more: nothing to do
  std::uint32_t sample_key;
};

/// Blocks that part `tokens` packed tokens into at most `rows` of one sequence each.
///
/// Sequence b takes the blocks from starts[b] / rows + b on: the next one begins far enough behind,
/// and each block finds its sequence without a table.
inline std::int64_t sequence_parts(const AttentionProblem& problem, std::int64_t rows) {
  return problem.tokens / rows + problem.sequences;
}

/// What begins at token number `first` of a sequence.
__device__ inline SequencePart part_of_sequence(const AttentionProblem& problem,
                                                std::int64_t sequence, std::int64_t first) {
  SequencePart part{};
  const std::int64_t begin = problem.starts[sequence], end = problem.starts[sequence + 1];
  // Starts that do not rise from 0 within the batch were not checked by the caller: touch nothing.
  if (begin < 0 || end > problem.tokens || end <= begin || first < 0) return part;
  part.row = begin;
  part.length = static_cast<int>(end - begin);
  part.key_length = part.length;
  if (problem.key_lengths != nullptr)
    part.key_length = max(1, min(problem.key_lengths[sequence], part.length));
  part.first = static_cast<int>(first);
  if (problem.dropout.enabled())
    part.sample_key = static_cast<std::uint32_t>(problem.sample_keys[sequence]);
  return part;
}

/// The part number `index`. All threads of a block get the same.
__device__ inline SequencePart sequence_part(const AttentionProblem& problem, std::int64_t index,
                                             int rows) {
  std::int64_t low = 0, high = problem.sequences - 1;
  while (low < high) {
    const std::int64_t middle = (low + high + 1) / 2;
    if (problem.starts[middle] / rows + middle <= index) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return part_of_sequence(problem, low, (index - (problem.starts[low] / rows + low)) * rows);
}

/// Columns of q, k and v of one head in a row of qkv or dqkv.
struct HeadColumns {
  std::int64_t q, k, v, stride;

  __device__ HeadColumns(const AttentionProblem& problem, std::int64_t head)
      : q(head * problem.head_size),
        k(problem.hidden_size() + q),
        v(2 * problem.hidden_size() + q),
        stride(3 * problem.hidden_size()) {}
};

/// The dropout row of head a and query q.
__device__ inline std::uint32_t dropout_row(std::int64_t head, int query) {
  return (static_cast<std::uint32_t>(head) << 16) | static_cast<std::uint32_t>(query);
}

template <typename T>
struct AttentionForward {
  const T* qkv;
  T* out;
  float* log_sum_exp;
};

template <typename T>
struct AttentionBackward {
  const T *qkv, *dout, *out;
  const float* log_sum_exp;
  T* dqkv;
  float* delta;  ///< [T, A] for attention_rows: inner products of dout and out
  float* dq;     ///< [T, H] for attention_tiles, while keys are still to come
};

}  // namespace bitfall
