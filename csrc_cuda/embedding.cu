#include "core/operation_checks.h"
#include "csrc_cuda/cuda_backend.h"
#include "csrc_cuda/element.cuh"
#include "csrc_cuda/reduce.cuh"

namespace bitfall {
namespace {

constexpr int kTables = 3;  ///< word, position, token_type
constexpr int kSumThreads = 128;
constexpr std::int64_t kMostTokens = 0x7f000000;  ///< of the backward pass, which counts in 32 bits

template <typename T>
struct Lookup {
  const T* table[kTables];
  const std::int32_t* ids[kTables];
};

/// y [T, H] = the sum of three rows, added in the order of the tables.
template <typename T>
__global__ void lookup_kernel(Lookup<T> lookup, T* y, std::int64_t tokens, std::int64_t columns) {
  const std::int64_t items = (columns + 7) / 8;  // of one row
  for (std::int64_t i = grid_thread(); i < tokens * items; i += grid_threads()) {
    const std::int64_t token = i / items, first = i % items * 8;
    Eight sum{};
#pragma unroll
    for (int table = 0; table < kTables; ++table) {
      const T* const row = lookup.table[table] + lookup.ids[table][token] * columns;
      const Eight values = load_eight(row, first, 0, columns);
#pragma unroll
      for (int j = 0; j < 8; ++j)
        sum.value[j] = table == 0 ? values.value[j] : sum.value[j] + values.value[j];
    }
    store_eight(y + token * columns, first, 0, columns, sum);
  }
}

/// What the backward pass knows of one table.
struct GradientTable {
  const std::int32_t* ids;  ///< [T]
  std::int32_t* first;      ///< [rows] first token with this id; larger than any token: none
  std::int32_t* last;       ///< [rows] last token with this id
  float* gradient;          ///< [rows, H]
};

/// Kernels take it as __grid_constant__: else every thread would copy it to memory of its own to
/// choose a table.
struct GradientTables {
  GradientTable table[kTables];
};

/// Minima and maxima of integers do not depend on the order in which atomics arrive.
__global__ void find_tokens_kernel(const __grid_constant__ GradientTables tables,
                                   std::int32_t tokens) {
  const std::int64_t token = grid_thread();
  if (token >= tokens) return;
  const GradientTable& table = tables.table[blockIdx.y];
  const std::int32_t id = table.ids[token];
  atomicMin(table.first + id, static_cast<std::int32_t>(token));
  atomicMax(table.last + id, static_cast<std::int32_t>(token));
}

/// Positions of the tokens begin + i, i < kSumThreads, up to `last` whose id is `id`, in rising
/// order in `found`; returns how many. All threads must call it.
__device__ inline int find_matches(const std::int32_t* ids, std::int32_t id, std::int32_t begin,
                                   std::int32_t last, std::int32_t* found) {
  __shared__ int counts[kSumThreads / kWarpThreads];
  const std::int32_t token = begin + static_cast<std::int32_t>(threadIdx.x);
  const bool matches = token <= last && ids[token] == id;
  const unsigned votes = __ballot_sync(kWholeWarp, matches);
  const unsigned warp = threadIdx.x / kWarpThreads, lane = threadIdx.x % kWarpThreads;
  __syncthreads();  // the last readers of `counts` and `found` are done
  if (lane == 0) counts[warp] = __popc(votes);
  __syncthreads();
  int before = 0, total = 0;
  for (unsigned other = 0; other < kSumThreads / kWarpThreads; ++other) {
    if (other < warp) before += counts[other];
    total += counts[other];
  }
  if (matches) found[before + __popc(votes & ((1u << lane) - 1u))] = token;
  __syncthreads();
  return total;
}

/// Block (token, columns, table) adds the rows of dy of all tokens with the id of `token`, in token
/// order, if `token` is the first of them. A thread owns a column.
template <typename T>
__global__ void add_rows_kernel(const __grid_constant__ GradientTables tables, const T* dy,
                                std::int64_t columns) {
  const GradientTable& table = tables.table[blockIdx.z];
  const auto token = static_cast<std::int32_t>(blockIdx.x);
  const std::int32_t id = table.ids[token];
  if (table.first[id] != token) return;  // the whole block
  const std::int32_t last = table.last[id];
  const std::int64_t column = static_cast<std::int64_t>(blockIdx.y) * kSumThreads + threadIdx.x;
  const bool exists = column < columns;
  float* const destination = table.gradient + id * columns + column;
  float sum = exists ? *destination : 0.0f;
  __shared__ std::int32_t found[kSumThreads];
  for (std::int32_t begin = token; begin <= last; begin += kSumThreads) {
    const int count = find_matches(table.ids, id, begin, last, found);
    if (!exists) continue;
#pragma unroll 16
    for (int i = 0; i < count; ++i) sum += widen(dy[found[i] * columns + column]);
  }
  if (exists) *destination = sum;
}

/// y[r] = x[index[r]]; rows outside of x give NaN.
template <typename T>
__global__ void gather_kernel(const T* x, std::int64_t x_rows, const std::int32_t* index, T* y,
                              std::int64_t rows, std::int64_t columns) {
  const std::int64_t items = (columns + 7) / 8;
  for (std::int64_t i = grid_thread(); i < rows * items; i += grid_threads()) {
    const std::int64_t row = i / items, first = i % items * 8, source = index[row];
    Eight values;
#pragma unroll
    for (int j = 0; j < 8; ++j) values.value[j] = __int_as_float(0x7fc00000);
    if (source >= 0 && source < x_rows)
      values = load_eight(x + source * columns, first, 0, columns);
    store_eight(y + row * columns, first, 0, columns, values);
  }
}

/// dx[index[r]] = dy[r]; rows outside of dx are left out.
template <typename T>
__global__ void scatter_kernel(const T* dy, const std::int32_t* index, T* dx, std::int64_t dx_rows,
                               std::int64_t rows, std::int64_t columns) {
  const std::int64_t items = (columns + 7) / 8;
  for (std::int64_t i = grid_thread(); i < rows * items; i += grid_threads()) {
    const std::int64_t row = i / items, first = i % items * 8, target = index[row];
    if (target < 0 || target >= dx_rows) continue;
    store_eight(dx + target * columns, first, 0, columns,
                load_eight(dy + row * columns, first, 0, columns));
  }
}

unsigned blocks_for_rows(std::int64_t rows, std::int64_t columns) {
  return blocks_for(rows * ((columns + 7) / 8));
}

}  // namespace

void CudaBackend::embedding_forward(const EmbeddingIds& ids, const EmbeddingTables& tables,
                                    const Tensor& y) {
  check_embedding("embedding_forward", ids, tables, y, y.dtype);
  if (y.numel() == 0) return;
  const std::int64_t tokens = y.shape[0], columns = y.shape[1];
  const cudaStream_t stream = this->stream();
  visit_dtype(y.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const Lookup<T> lookup{
        {device_data<const T>(tables.word), device_data<const T>(tables.position),
         device_data<const T>(tables.token_type)},
        {device_data<const std::int32_t>(ids.input_ids),
         device_data<const std::int32_t>(ids.position_ids),
         device_data<const std::int32_t>(ids.token_type_ids)}};
    lookup_kernel<T><<<blocks_for_rows(tokens, columns), kBlockThreads, 0, stream>>>(
        lookup, device_data<T>(y), tokens, columns);
  });
  check_launch("embedding_forward");
}

void CudaBackend::embedding_backward(const EmbeddingIds& ids, const Tensor& dy,
                                     const EmbeddingTables& gradients) {
  check_embedding("embedding_backward", ids, gradients, dy, DType::f32);
  if (dy.numel() == 0) return;
  const std::int64_t tokens = dy.shape[0], columns = dy.shape[1];
  check<UnsupportedError>(tokens <= kMostTokens, "embedding_backward on cuda: ", tokens,
                          " tokens, expected at most ", kMostTokens, ": use smaller micro-batches");
  const Tensor* const table[kTables] = {&gradients.word, &gradients.position,
                                        &gradients.token_type};
  const Tensor* const id[kTables] = {&ids.input_ids, &ids.position_ids, &ids.token_type_ids};
  std::int64_t table_rows = 0;
  for (const Tensor* gradient : table) table_rows += gradient->shape[0];
  const std::size_t bytes = static_cast<std::size_t>(table_rows) * sizeof(std::int32_t);
  auto* first = static_cast<std::int32_t*>(scratch(2 * bytes));
  auto* last = first + table_rows;
  const cudaStream_t stream = this->stream();
  // 0x7f7f7f7f, the largest positive number that memset writes, and -1: no token.
  cuda_check(cudaMemsetAsync(first, 0x7f, bytes, stream), "cudaMemsetAsync");
  cuda_check(cudaMemsetAsync(last, 0xff, bytes, stream), "cudaMemsetAsync");
  GradientTables tables{};
  for (int i = 0; i < kTables; ++i) {
    tables.table[i] = {device_data<const std::int32_t>(*id[i]), first, last,
                       device_data<float>(*table[i])};
    first += table[i]->shape[0];
    last += table[i]->shape[0];
  }
  const auto blocks = static_cast<unsigned>((tokens + kBlockThreads - 1) / kBlockThreads);
  find_tokens_kernel<<<dim3(blocks, kTables), kBlockThreads, 0, stream>>>(
      tables, static_cast<std::int32_t>(tokens));
  check_launch("embedding_backward");
  const dim3 grid(static_cast<unsigned>(tokens),
                  static_cast<unsigned>((columns + kSumThreads - 1) / kSumThreads), kTables);
  visit_dtype(dy.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    add_rows_kernel<T><<<grid, kSumThreads, 0, stream>>>(tables, device_data<const T>(dy), columns);
  });
  check_launch("embedding_backward");
}

void CudaBackend::gather_rows(const Tensor& x, const Tensor& row_index, const Tensor& y) {
  check_rows("gather_rows", y, row_index, x);
  if (y.numel() == 0) return;
  const std::int64_t rows = y.shape[0], columns = y.shape[1];
  const cudaStream_t stream = this->stream();
  visit_dtype(y.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    gather_kernel<T><<<blocks_for_rows(rows, columns), kBlockThreads, 0, stream>>>(
        device_data<const T>(x), x.shape[0], device_data<const std::int32_t>(row_index),
        device_data<T>(y), rows, columns);
  });
  check_launch("gather_rows");
}

void CudaBackend::scatter_rows(const Tensor& dy, const Tensor& row_index, const Tensor& dx) {
  check_rows("scatter_rows", dy, row_index, dx);
  fill_zero(dx);
  if (dy.numel() == 0) return;
  const std::int64_t rows = dy.shape[0], columns = dy.shape[1];
  const cudaStream_t stream = this->stream();
  visit_dtype(dy.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    scatter_kernel<T><<<blocks_for_rows(rows, columns), kBlockThreads, 0, stream>>>(
        device_data<const T>(dy), device_data<const std::int32_t>(row_index), device_data<T>(dx),
        dx.shape[0], rows, columns);
  });
  check_launch("scatter_rows");
}

}  // namespace bitfall
