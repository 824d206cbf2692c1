
#include "core/operation_checks.h"
#include "csrc_cpu/cpu_backend.h"
#include "csrc_cpu/parallel.h"

namespace bitfall {
namespace {

void check_row_index(const char* operation, const Tensor& row_index, std::int64_t rows) {
  const auto* index = row_index.as<std::int32_t>();
  for (std::int64_t i = 0; i < row_index.numel(); ++i) {
    check<ShapeError>(index[i] >= 0 && index[i] < rows, operation, ": row_index[", i,
                      "] = ", index[i], " is outside of 0..", rows - 1);
  }
}

void check_chosen_rows(const char* operation, const Tensor& few, const Tensor& row_index,
                       const Tensor& many) {
  check_rows(operation, few, row_index, many);
  check_row_index(operation, row_index, many.shape[0]);
}

}  // namespace

void CpuBackend::embedding_forward(const EmbeddingIds& ids, const EmbeddingTables& tables,
                                   const Tensor& y) {
  check_embedding("embedding_forward", ids, tables, y, y.dtype);
  const std::int64_t hidden_size = y.shape[1];
  parallel_rows(y.shape[0], hidden_size, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t token = begin; token < end; ++token) {
      const auto row = [&](const Tensor& table, const Tensor& id) {
        return element(table, id.as<std::int32_t>()[token] * hidden_size);
      };
      kernels_.elementwise->add_three(
          y.dtype, row(tables.word, ids.input_ids), row(tables.position, ids.position_ids),
          row(tables.token_type, ids.token_type_ids), element(y, token * hidden_size), hidden_size);
    }
  });
}

void CpuBackend::embedding_backward(const EmbeddingIds& ids, const Tensor& dy,
                                    const EmbeddingTables& gradients) {
  check_embedding("embedding_backward", ids, gradients, dy, DType::f32);
  const std::int64_t tokens = dy.shape[0], hidden_size = dy.shape[1];
  // Each thread owns columns and walks all tokens: every sum runs in token order. 64 columns keep
  // threads out of each other's cache lines.
  parallel_ranges(hidden_size, 64, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t token = 0; token < tokens; ++token) {
      const auto add_to = [&](const Tensor& table, const Tensor& id) {
        kernels_.elementwise->accumulate(
            dy.dtype, element(dy, token * hidden_size + begin),
            table.as<float>() + id.as<std::int32_t>()[token] * hidden_size + begin, end - begin);
      };
      add_to(gradients.word, ids.input_ids);
      add_to(gradients.position, ids.position_ids);
      add_to(gradients.token_type, ids.token_type_ids);
    }
  });
}

void CpuBackend::gather_rows(const Tensor& x, const Tensor& row_index, const Tensor& y) {
  check_chosen_rows("gather_rows", y, row_index, x);
  const std::int64_t columns = x.shape[1];
  for (std::int64_t row = 0; row < y.shape[0]; ++row) {
    copy(x.flat_slice(row_index.as<std::int32_t>()[row] * columns, columns),
         y.flat_slice(row * columns, columns));
  }
}

void CpuBackend::scatter_rows(const Tensor& dy, const Tensor& row_index, const Tensor& dx) {
  check_chosen_rows("scatter_rows", dy, row_index, dx);
  const std::int64_t columns = dx.shape[1];
  fill_zero(dx);
  for (std::int64_t row = 0; row < dy.shape[0]; ++row) {
    copy(dy.flat_slice(row * columns, columns),
         dx.flat_slice(row_index.as<std::int32_t>()[row] * columns, columns));
  }
}

}  // namespace bitfall
