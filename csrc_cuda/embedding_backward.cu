// Gradients of the embedding tables: tokens are sorted by their rows, and each row gets the sum
// over its run of tokens. A thread adds up a piece of the sorted list, so that a row of many tokens
// (a token type has thousands) is the work of many threads; the order of all sums is fixed.
#include <bit>
#include <cstddef>
#include <cub/device/device_radix_sort.cuh>

#include "core/operation_checks.h"
#include "csrc_cuda/column_sums.cuh"
#include "csrc_cuda/cuda_backend.h"
#include "csrc_cuda/element.cuh"

namespace bitfall {
namespace {

constexpr int kTables = 3;                                  ///< word, position, token_type
constexpr std::int64_t kMostTokens = 0x7fffffff / kTables;  ///< sorting counts in 32 bits
constexpr int kPiece = 32;  ///< list entries that one thread adds up
constexpr int kPieceThreads = 128;
constexpr std::uint32_t kNoRow = 0xffffffff;

std::int64_t pieces_of(std::int64_t entries) { return (entries + kPiece - 1) / kPiece; }

/// The rows of all tables are numbered one table behind the other.
struct Tables {
  const std::int32_t* ids[kTables];  ///< [T]
  float* gradient[kTables];          ///< [rows, H]
  std::uint32_t first_row[kTables + 1];
};

/// Entry i: `token[i]` adds to `row[i]`. Rows rise, tokens of a row rise.
struct Entries {
  std::uint32_t* row;
  std::uint32_t* token;
};

/// The not yet sorted entry of token x and table y.
__global__ void list_kernel(const __grid_constant__ Tables tables, std::int64_t tokens,
                            Entries entries) {
  const std::int64_t token = grid_thread();
  if (token >= tokens) return;
  const std::int64_t entry = blockIdx.y * tokens + token;
  entries.row[entry] =
      tables.first_row[blockIdx.y] + static_cast<std::uint32_t>(tables.ids[blockIdx.y][token]);
  entries.token[entry] = static_cast<std::uint32_t>(token);
}

/// Address of a row's gradient. Without an index that only the kernel knows, which would take the
/// tables to memory.
__device__ inline float* gradient_row(const Tables& tables, std::uint32_t row,
                                      std::int64_t columns) {
  float* table = tables.gradient[0];
  std::uint32_t first = 0;
#pragma unroll
  for (int i = 1; i < kTables; ++i) {
    if (row < tables.first_row[i]) break;
    table = tables.gradient[i];
    first = tables.first_row[i];
  }
  return table + (row - first) * columns;
}

/// A thread adds the tokens of a piece to their rows, or to heads[piece] if the row's run begins in
/// an earlier piece, whose thread may be adding to the row.
template <typename T, int kWidth>
__global__ void add_pieces_kernel(Entries entries, std::int64_t count, Tables tables, const T* dy,
                                  std::int64_t columns, float* heads) {
  const std::int64_t chunks = columns / kWidth, piece = grid_thread() / chunks;
  const std::int64_t column = grid_thread() % chunks * kWidth;
  const std::int64_t begin = piece * kPiece, end = min(begin + kPiece, count);
  if (begin >= end) return;
  const std::uint32_t head = begin > 0 ? entries.row[begin - 1] : kNoRow;
  Eight sum{};
  for (std::int64_t entry = begin; entry < end; entry += kInFlight) {
    std::uint32_t row[kInFlight + 1];
#pragma unroll
    for (int i = 0; i <= kInFlight; ++i) row[i] = entry + i < end ? entries.row[entry + i] : kNoRow;
    // First all loads, then what waits for them.
    Eight values[kInFlight], before[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const std::uint32_t token = entries.token[min(entry + i, end - 1)];
      values[i] = load_chunk<kWidth>(dy + token * columns + column);
      before[i] = Eight{};
      if (row[i] != row[i + 1] && row[i] != head)
        before[i] = load_chunk<kWidth>(gradient_row(tables, row[i], columns) + column);
    }
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      if (row[i] == kNoRow) break;
      add_chunk<kWidth>(sum, values[i]);
      if (row[i] == row[i + 1]) continue;
      add_chunk<kWidth>(before[i], sum);
      float* const destination =
          row[i] == head ? heads + piece * columns : gradient_row(tables, row[i], columns);
      store_chunk<kWidth>(destination + column, before[i]);
      sum = Eight{};
    }
  }
}

/// If the run of the first row of piece x began in the piece before, the block adds the heads of
/// the run to the row.
template <int kWidth>
__global__ void __launch_bounds__(kSumThreads, kSumBlocks)
    add_heads_kernel(const std::uint32_t* row, std::int64_t pieces, Tables tables,
                     std::int64_t columns, const float* heads) {
  const std::int64_t piece = blockIdx.x + 1;
  const std::uint32_t run = row[piece * kPiece];
  if (row[piece * kPiece - 1] != run) return;
  if (piece > 1 && row[(piece - 1) * kPiece - 1] == run) return;  // it began earlier
  std::int64_t last = piece, behind = pieces;
  while (behind - last > 1) {
    const std::int64_t middle = (last + behind) / 2;
    (row[middle * kPiece] == run ? last : behind) = middle;
  }
  const std::int64_t column =
      (static_cast<std::int64_t>(blockIdx.y) * kSumLanes + threadIdx.x) * kWidth;
  const Eight sum = block_column_sums<kWidth>(heads, piece, behind, column, columns);
  if (threadIdx.y != 0 || column >= columns) return;
  float* const destination = gradient_row(tables, run, columns) + column;
  Eight total = load_chunk<kWidth>(destination);
  add_chunk<kWidth>(total, sum);
  store_chunk<kWidth>(destination, total);
}

Tables tables_of(const EmbeddingIds& ids, const EmbeddingTables& gradients) {
  const Tensor* const gradient[kTables] = {&gradients.word, &gradients.position,
                                           &gradients.token_type};
  const Tensor* const id[kTables] = {&ids.input_ids, &ids.position_ids, &ids.token_type_ids};
  Tables tables{};
  for (int i = 0; i < kTables; ++i) {
    tables.ids[i] = device_data<const std::int32_t>(*id[i]);
    tables.gradient[i] = device_data<float>(*gradient[i]);
    const auto rows = static_cast<std::uint32_t>(gradient[i]->shape[0]);
    tables.first_row[i + 1] = tables.first_row[i] + rows;
  }
  return tables;
}

/// Sorts `listed` by row into `sorted`, tokens of a row in their order. Without `storage` it only
/// says how many bytes that takes.
void sort(void* storage, std::size_t& bytes, const Entries& listed, const Entries& sorted,
          std::int64_t count, std::uint32_t rows, cudaStream_t stream) {
  const int bits = static_cast<int>(std::bit_width(rows));
  cuda_check(
      cub::DeviceRadixSort::SortPairs(storage, bytes, listed.row, sorted.row, listed.token,
                                      sorted.token, static_cast<int>(count), 0, bits, stream),
      "cub::DeviceRadixSort::SortPairs");
}

template <typename T, int kWidth>
void launch_sums(const Entries& sorted, std::int64_t count, const Tables& tables, const Tensor& dy,
                 float* heads, cudaStream_t stream) {
  const std::int64_t columns = dy.shape[1], pieces = pieces_of(count);
  const std::int64_t threads = pieces * (columns / kWidth);
  const auto blocks = static_cast<unsigned>((threads + kPieceThreads - 1) / kPieceThreads);
  add_pieces_kernel<T, kWidth><<<blocks, kPieceThreads, 0, stream>>>(
      sorted, count, tables, device_data<const T>(dy), columns, heads);
  check_launch("embedding_backward");
  if (pieces == 1) return;
  constexpr int kColumns = kSumLanes * kWidth;
  const dim3 grid(static_cast<unsigned>(pieces - 1),
                  static_cast<unsigned>((columns + kColumns - 1) / kColumns));
  add_heads_kernel<kWidth>
      <<<grid, dim3(kSumLanes, kSumRows), 0, stream>>>(sorted.row, pieces, tables, columns, heads);
  check_launch("embedding_backward");
}

/// Whether rows can be read and written 16 bytes at a time.
bool whole_packs(const Tables& tables, const Tensor& dy) {
  bool whole = dy.shape[1] % 8 == 0 && aligned(static_cast<const std::byte*>(dy.data));
  for (const float* gradient : tables.gradient) whole = whole && aligned(gradient);
  return whole;
}

}  // namespace

void CudaBackend::embedding_backward(const EmbeddingIds& ids, const Tensor& dy,
                                     const EmbeddingTables& gradients) {
  check_embedding("embedding_backward", ids, gradients, dy, DType::f32);
  if (dy.numel() == 0) return;
  const std::int64_t tokens = dy.shape[0], columns = dy.shape[1], count = kTables * tokens;
  check<UnsupportedError>(tokens <= kMostTokens, "embedding_backward on cuda: ", tokens,
                          " tokens, expected at most ", kMostTokens, ": use smaller micro-batches");
  const Tables tables = tables_of(ids, gradients);
  const std::uint32_t rows = tables.first_row[kTables];
  const cudaStream_t stream = this->stream();
  const auto head_bytes = static_cast<std::size_t>(pieces_of(count) * columns) * sizeof(float);
  const std::size_t entry_bytes = 4 * static_cast<std::size_t>(count) * sizeof(std::uint32_t);
  std::size_t sort_bytes = 0;
  sort(nullptr, sort_bytes, {}, {}, count, rows, stream);
  auto* const memory = static_cast<std::byte*>(scratch(head_bytes + entry_bytes + sort_bytes));
  auto* const heads = reinterpret_cast<float*>(memory);  // first, for they want 16-byte addresses
  auto* const numbers = reinterpret_cast<std::uint32_t*>(memory + head_bytes);
  const Entries listed{numbers, numbers + count};
  const Entries sorted{numbers + 2 * count, numbers + 3 * count};

  const auto blocks = static_cast<unsigned>((tokens + kBlockThreads - 1) / kBlockThreads);
  list_kernel<<<dim3(blocks, kTables), kBlockThreads, 0, stream>>>(tables, tokens, listed);
  check_launch("embedding_backward");
  sort(memory + head_bytes + entry_bytes, sort_bytes, listed, sorted, count, rows, stream);
  const bool packs = whole_packs(tables, dy);
  visit_dtype(dy.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto launch = packs ? launch_sums<T, 8> : launch_sums<T, 1>;
    launch(sorted, count, tables, dy, heads, stream);
  });
}

}  // namespace bitfall
