#include <cublasLt.h>

#include "core/dtype.h"

namespace {

using bitfall::BFloat16;
using bitfall::Float16;

/// A matrix as cuBLASLt sees it: column by column, and transposed on request.
struct Matrix {
  void* data;
  std::remove_pointer_t<cublasLtMatrixLayout_t> layout;
  cublasOperation_t operation = CUBLAS_OP_N;

  std::uint64_t rows() const { return operation == CUBLAS_OP_N ? layout.rows : layout.columns; }
  std::uint64_t columns() const { return operation == CUBLAS_OP_N ? layout.columns : layout.rows; }
  std::uint64_t index(std::uint64_t row, std::uint64_t column) const {
    const auto leading = static_cast<std::uint64_t>(layout.leading_dimension);
    return operation == CUBLAS_OP_N ? column * leading + row : row * leading + column;
  }
  float read(std::uint64_t i) const {
    if (layout.type == CUDA_R_32F) return static_cast<const float*>(data)[i];
    if (layout.type == CUDA_R_16F) return bitfall::to_float(static_cast<const Float16*>(data)[i]);
    return bitfall::to_float(static_cast<const BFloat16*>(data)[i]);
  }
  void write(std::uint64_t i, float value) const {
    if (layout.type == CUDA_R_32F) {
      static_cast<float*>(data)[i] = value;
    } else if (layout.type == CUDA_R_16F) {
      static_cast<Float16*>(data)[i] = bitfall::from_float<Float16>(value);
    } else {
      static_cast<BFloat16*>(data)[i] = bitfall::from_float<BFloat16>(value);
    }
  }
};

/// What a product reads when it runs, which is later than the call while a stream is recorded.
struct Product {
  Matrix a, b, d, bias;
  float factor, old;
  bool has_bias;

  void run() const {
    for (std::uint64_t column = 0; column < d.columns(); ++column) {
      for (std::uint64_t row = 0; row < d.rows(); ++row) {
        float sum = 0;
        for (std::uint64_t k = 0; k < a.columns(); ++k)
          sum += a.read(a.index(row, k)) * b.read(b.index(k, column));
        sum *= factor;
        if (old != 0) sum += old * d.read(d.index(row, column));
        if (has_bias) sum += bias.read(row);
        d.write(d.index(row, column), sum);
      }
    }
  }
};

}  // namespace

cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t description,
                                              cublasLtMatmulDescAttributes_t attribute,
                                              const void* value, std::size_t bytes) {
  void* const targets[] = {&description->operation[0], &description->operation[1],
                           &description->epilogue, &description->bias};
  std::memcpy(targets[attribute], value, bytes);
  return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmul(cublasLtHandle_t, cublasLtMatmulDesc_t description, const void* alpha,
                              const void* a_data, cublasLtMatrixLayout_t a_layout,
                              const void* b_data, cublasLtMatrixLayout_t b_layout, const void* beta,
                              const void*, cublasLtMatrixLayout_t, void* d_data,
                              cublasLtMatrixLayout_t d_layout, const cublasLtMatmulAlgo_t*, void*,
                              std::size_t, cudaStream_t stream) {
  const Matrix a{const_cast<void*>(a_data), *a_layout, description->operation[0]};
  const Matrix b{const_cast<void*>(b_data), *b_layout, description->operation[1]};
  const Matrix d{d_data, *d_layout};
  // The preferences say nothing about the bias, so algorithms expect it where cudaMalloc would be.
  emulator::check(description->epilogue != CUBLASLT_EPILOGUE_BIAS ||
                      reinterpret_cast<std::uintptr_t>(description->bias) % 16 == 0,
                  "cublasLtMatmul: address of the bias");
  if (a.rows() != d.rows() || b.columns() != d.columns() || a.columns() != b.rows())
    return CUBLAS_STATUS_NOT_SUPPORTED;
  const Product product{a,
                        b,
                        d,
                        {const_cast<void*>(description->bias), *d_layout},
                        *static_cast<const float*>(alpha),
                        *static_cast<const float*>(beta),
                        description->epilogue == CUBLASLT_EPILOGUE_BIAS};
  emulator::submit(stream, [product] { product.run(); });
  return CUBLAS_STATUS_SUCCESS;
}
