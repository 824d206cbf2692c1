
#include "csrc_cpu/checks.h"
#include "csrc_cpu/cpu_backend.h"
#include "csrc_cpu/parallel.h"

namespace bitfall {
namespace {

/// Checks ids and tables against the token rows [T, H].
void check_embedding(const char* operation, const EmbeddingIds& ids, const EmbeddingTables& tables,
                     const Tensor& rows, DType table_dtype) {
  check_rank(operation, "token rows", rows, 2);
  check_floating(operation, "token rows", rows);
  const Shape tokens{rows.shape[0]};
  check_tensor(operation, "input_ids", ids.input_ids, DType::s32, tokens);
  check_tensor(operation, "position_ids", ids.position_ids, DType::s32, tokens);
  check_tensor(operation, "token_type_ids", ids.token_type_ids, DType::s32, tokens);
  const auto check_table = [&](const char* what, const Tensor& table) {
    check_rank(operation, what, table, 2);
    check_tensor(operation, what, table, table_dtype, Shape{table.shape[0], rows.shape[1]});
  };
  check_table("word table", tables.word);
  check_table("position table", tables.position);
  check_table("token_type table", tables.token_type);
}

void check_row_index(const char* operation, const Tensor& row_index, std::int64_t rows) {
  const auto* index = row_index.as<std::int32_t>();
  for (std::int64_t i = 0; i < row_index.numel(); ++i) {
    check<ShapeError>(index[i] >= 0 && index[i] < rows, operation, ": row_index[", i,
                      "] = ", index[i], " is outside of 0..", rows - 1);
  }
}

/// Checks that `few` [R, H] are rows of `many` [T, H] chosen by row_index [R].
void check_rows(const char* operation, const Tensor& few, const Tensor& row_index,
                const Tensor& many) {
  check_rank(operation, "selected rows", few, 2);
  check_floating(operation, "selected rows", few);
  check_rank(operation, "all rows", many, 2);
  check_tensor(operation, "all rows", many, few.dtype, Shape{many.shape[0], few.shape[1]});
  check_tensor(operation, "row_index", row_index, DType::s32, Shape{few.shape[0]});
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
  check_rows("gather_rows", y, row_index, x);
  const std::int64_t columns = x.shape[1];
  for (std::int64_t row = 0; row < y.shape[0]; ++row) {
    copy(x.flat_slice(row_index.as<std::int32_t>()[row] * columns, columns),
         y.flat_slice(row * columns, columns));
  }
}

void CpuBackend::scatter_rows(const Tensor& dy, const Tensor& row_index, const Tensor& dx) {
  check_rows("scatter_rows", dy, row_index, dx);
  const std::int64_t columns = dx.shape[1];
  fill_zero(dx);
  for (std::int64_t row = 0; row < dy.shape[0]; ++row) {
    copy(dy.flat_slice(row * columns, columns),
         dx.flat_slice(row_index.as<std::int32_t>()[row] * columns, columns));
  }
}

}  // namespace bitfall
