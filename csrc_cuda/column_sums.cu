// Sums over the rows of a matrix: gradients of biases, and the last stage of those of LayerNorm.
#include <algorithm>

#include "csrc_cuda/column_sums.cuh"
#include "csrc_cuda/cuda_backend.h"
#include "csrc_cuda/element.cuh"

namespace bitfall {
namespace {

/// Sums rows [y * rows_per_block, ...) of x [rows, columns] into sums[y, columns], y = blockIdx.y.
template <typename T, int kWidth>
__global__ void __launch_bounds__(kSumThreads, kSumBlocks)
    column_sums_kernel(const T* x, std::int64_t rows, std::int64_t columns,
                       std::int64_t rows_per_block, float* sums, Accumulate accumulate) {
  const std::int64_t column =
      (static_cast<std::int64_t>(blockIdx.x) * kSumLanes + threadIdx.x) * kWidth;
  const std::int64_t begin = blockIdx.y * rows_per_block;
  const std::int64_t end = min(begin + rows_per_block, rows);
  Eight total = block_column_sums<kWidth>(x, begin, end, column, columns);
  if (threadIdx.y != 0 || column >= columns) return;
  float* const destination = sums + blockIdx.y * columns + column;
  if (accumulate == Accumulate::yes) add_chunk<kWidth>(total, load_chunk<kWidth>(destination));
  store_chunk<kWidth>(destination, total);
}

/// Pieces into which the rows are cut: by their number alone, so that sums are reproducible.
std::int64_t row_pieces(std::int64_t rows) {
  constexpr std::int64_t kRowsPerPiece = 128, kMostPieces = 128;
  return std::clamp<std::int64_t>((rows + kRowsPerPiece - 1) / kRowsPerPiece, 1, kMostPieces);
}

template <typename T, int kWidth>
void launch(const Tensor& x, std::int64_t pieces, float* sums, Accumulate accumulate,
            cudaStream_t stream) {
  const std::int64_t rows = x.shape[0], columns = x.shape[1], lanes = columns / kWidth;
  const dim3 grid(static_cast<unsigned>((lanes + kSumLanes - 1) / kSumLanes),
                  static_cast<unsigned>(pieces));
  column_sums_kernel<T, kWidth><<<grid, dim3(kSumLanes, kSumRows), 0, stream>>>(
      device_data<const T>(x), rows, columns, (rows + pieces - 1) / pieces, sums, accumulate);
  check_launch("column sums");
}

void sum_pieces(const Tensor& x, std::int64_t pieces, float* sums, Accumulate accumulate,
                cudaStream_t stream) {
  visit_dtype(x.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const bool packs = x.shape[1] % 8 == 0 && aligned(device_data<const T>(x)) && aligned(sums);
    const auto run = packs ? launch<T, 8> : launch<T, 1>;
    run(x, pieces, sums, accumulate, stream);
  });
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
  if (pieces == 1) return sum_pieces(x, 1, destination, accumulate, stream);
  sum_pieces(x, pieces, work, Accumulate::no, stream);
  const Tensor parts{work, DType::f32, Shape{pieces, columns}, Device::cuda};
  sum_pieces(parts, 1, destination, accumulate, stream);
}

}  // namespace bitfall
