// Sums over the rows of a matrix: gradients of biases, and the last stage of those of LayerNorm.
#include <algorithm>

#include "csrc_cuda/cuda_backend.h"
#include "csrc_cuda/element.cuh"
#include "csrc_cuda/reduce.cuh"

namespace bitfall {
namespace {

constexpr int kTile = 32;  ///< columns, and threads that share the rows of a column

/// Sums rows [y * rows_per_block, ...) of x [rows, columns] into sums[y, columns], y = blockIdx.y.
/// The launch bound keeps so large a block within the registers of a multiprocessor.
template <typename T>
__global__ void __launch_bounds__(kTile* kTile)
    column_sums_kernel(const T* x, std::int64_t rows, std::int64_t columns,
                       std::int64_t rows_per_block, float* sums, Accumulate accumulate) {
  __shared__ float partial[kTile][kTile + 1];
  const std::int64_t first = static_cast<std::int64_t>(blockIdx.x) * kTile;
  const std::int64_t begin = blockIdx.y * rows_per_block;
  const std::int64_t end = begin + rows_per_block < rows ? begin + rows_per_block : rows;
  const std::int64_t column = first + threadIdx.x;
  float sum = 0.0f;
  if (column < columns) {
#pragma unroll 8
    for (std::int64_t row = begin + threadIdx.y; row < end; row += kTile)
      sum += widen(x[row * columns + column]);
  }
  partial[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  // Each warp adds the 32 parts of one column.
  const float total = warp_sum(partial[threadIdx.x][threadIdx.y]);
  const std::int64_t summed = first + threadIdx.y;
  if (threadIdx.x != 0 || summed >= columns) return;
  float* const destination = sums + blockIdx.y * columns + summed;
  *destination = accumulate == Accumulate::yes ? *destination + total : total;
}

/// Pieces into which the rows are cut: by their number alone, so that sums are reproducible.
std::int64_t row_pieces(std::int64_t rows) {
  constexpr std::int64_t kRowsPerPiece = 256, kMostPieces = 64;
  return std::clamp<std::int64_t>((rows + kRowsPerPiece - 1) / kRowsPerPiece, 1, kMostPieces);
}

void launch(const Tensor& x, std::int64_t rows, std::int64_t columns, std::int64_t pieces,
            float* sums, Accumulate accumulate, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>((columns + kTile - 1) / kTile),
                  static_cast<unsigned>(pieces));
  visit_dtype(x.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    column_sums_kernel<T><<<grid, dim3(kTile, kTile), 0, stream>>>(
        device_data<const T>(x), rows, columns, (rows + pieces - 1) / pieces, sums, accumulate);
  });
  check_launch("column sums");
}

}  // namespace

std::int64_t CudaBackend::column_sums_work(std::int64_t rows, std::int64_t columns) {
  return row_pieces(rows) * columns;
}

void CudaBackend::column_sums(const Tensor& x, const Tensor& sums, Accumulate accumulate,
                              float* work) {
  const std::int64_t rows = x.shape[0], columns = x.shape[1], pieces = row_pieces(rows);
  if (columns == 0) return;
  float* const destination = device_data<float>(sums);
  const cudaStream_t stream = this->stream();
  if (pieces == 1) return launch(x, rows, columns, 1, destination, accumulate, stream);
  launch(x, rows, columns, pieces, work, Accumulate::no, stream);
  const Tensor parts{work, DType::f32, Shape{pieces, columns}, Device::cuda};
  launch(parts, pieces, columns, 1, destination, accumulate, stream);
}

}  // namespace bitfall
