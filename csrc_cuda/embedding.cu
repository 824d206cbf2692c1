#include "core/operation_checks.h"
#include "csrc_cuda/cuda_backend.h"
#include "csrc_cuda/element.cuh"

namespace bitfall {
namespace {

constexpr int kTables = 3;  ///< word, position, token_type

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
