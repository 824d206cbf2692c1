#include <cmath>

#include "tests/support/backend_fixture.h"

namespace bitfall::test {
namespace {

class EmbeddingTest : public BackendTest {
 protected:
  EmbeddingIds ids(std::int64_t tokens, std::int32_t vocabulary) {
    std::vector<std::int32_t> word, position, type;
    for (std::int32_t t = 0; t < tokens; ++t) {
      word.push_back(t * 7 % vocabulary);  // every id several times
      position.push_back(t % 5);
      type.push_back(t % 2);
    }
    return {integers(Shape{tokens}, word), integers(Shape{tokens}, position),
            integers(Shape{tokens}, type)};
  }
};

TEST_P(EmbeddingTest, ForwardAddsThreeRows) {
  for (const std::int64_t hidden : {1, 7, 33, 384}) {
    const EmbeddingIds id = ids(130, 11);
    const EmbeddingTables tables{random(Shape{11, hidden}, dtype()),
                                 random(Shape{5, hidden}, dtype()),
                                 random(Shape{2, hidden}, dtype())};
    const Tensor y = zeros(Shape{130, hidden}, dtype());
    backend().embedding_forward(id, tables, y);
    const std::vector<double> word = values(tables.word), position = values(tables.position),
                              type = values(tables.token_type);
    std::vector<double> expected;
    for (std::int64_t t = 0; t < 130; ++t) {
      for (std::int64_t h = 0; h < hidden; ++h) {
        const auto at = [&](const std::vector<double>& table, const Tensor& index) {
          return table[static_cast<std::size_t>(index.as<std::int32_t>()[t] * hidden + h)];
        };
        expected.push_back(at(word, id.input_ids) + at(position, id.position_ids) +
                           at(type, id.token_type_ids));
      }
    }
    EXPECT_TRUE(close(y, expected, tolerance())) << hidden;
  }
}

TEST_P(EmbeddingTest, BackwardAddsToRowsInTokenOrder) {
  for (const std::int64_t hidden : {1, 7, 33, 384}) {
    const EmbeddingIds id = ids(130, 11);
    const EmbeddingTables gradients{random(Shape{11, hidden}, DType::f32),
                                    random(Shape{5, hidden}, DType::f32),
                                    random(Shape{2, hidden}, DType::f32)};
    const Tensor dy = random(Shape{130, hidden}, dtype());
    // The same additions in f32, one by one in token order: equal bit for bit.
    const auto expected = [&](const Tensor& table, const Tensor& index) {
      const Tensor sum = zeros(table.shape, DType::f32);
      backend().copy(table, sum);
      const std::vector<double> gradient = values(dy);
      for (std::int64_t i = 0; i < 130 * hidden; ++i) {
        sum.as<float>()[index.as<std::int32_t>()[i / hidden] * hidden + i % hidden] +=
            static_cast<float>(gradient[static_cast<std::size_t>(i)]);
      }
      return sum;
    };
    const Tensor word = expected(gradients.word, id.input_ids);
    const Tensor position = expected(gradients.position, id.position_ids);
    const Tensor type = expected(gradients.token_type, id.token_type_ids);
    backend().embedding_backward(id, dy, gradients);
    EXPECT_TRUE(identical(gradients.word, word));
    EXPECT_TRUE(identical(gradients.position, position));
    EXPECT_TRUE(identical(gradients.token_type, type));
  }
}

TEST_P(EmbeddingTest, NoTokensAreFine) {
  const EmbeddingTables tables{zeros(Shape{3, 4}, dtype()), zeros(Shape{3, 4}, dtype()),
                               zeros(Shape{3, 4}, dtype())};
  backend().embedding_forward(ids(0, 3), tables, zeros(Shape{0, 4}, dtype()));
}

TEST_P(EmbeddingTest, RefusesWhatDoesNotFit) {
  const EmbeddingTables good{zeros(Shape{9, 4}, dtype()), zeros(Shape{5, 4}, dtype()),
                             zeros(Shape{2, 4}, dtype())};
  const Tensor y = zeros(Shape{6, 4}, dtype());
  EmbeddingTables wide = good;
  wide.position = zeros(Shape{5, 3}, dtype());
  EXPECT_THROW(backend().embedding_forward(ids(6, 9), wide, y), ShapeError);
  EXPECT_THROW(backend().embedding_forward(ids(5, 9), good, y), ShapeError);
  EmbeddingTables integer = good;
  integer.word = zeros(Shape{9, 4}, DType::s32);
  EXPECT_THROW(backend().embedding_forward(ids(6, 9), integer, y), UnsupportedError);
  EmbeddingTables half = good;
  half.word = zeros(Shape{9, 4}, DType::f16);
  EXPECT_THROW(backend().embedding_backward(ids(6, 9), y, half), UnsupportedError);
}

TEST_P(EmbeddingTest, GatherAndScatterRows) {
  for (const std::int64_t columns : {1, 7, 384}) {
    const Tensor x = random(Shape{6, columns}, dtype()), y = zeros(Shape{3, columns}, dtype());
    const Tensor index = integers(Shape{3}, {4, 0, 5});
    backend().gather_rows(x, index, y);
    EXPECT_TRUE(identical(y.rows(0, 1), x.rows(4, 1)));
    EXPECT_TRUE(identical(y.rows(1, 1), x.rows(0, 1)));
    EXPECT_TRUE(identical(y.rows(2, 1), x.rows(5, 1)));
    const Tensor dx = random(Shape{6, columns}, dtype());
    backend().scatter_rows(y, index, dx);
    for (const std::int64_t row : {4, 0, 5})
      EXPECT_TRUE(identical(dx.rows(row, 1), x.rows(row, 1)));
    for (const std::int64_t row : {1, 2, 3})
      EXPECT_EQ(values(dx.rows(row, 1)),
                std::vector<double>(static_cast<std::size_t>(columns), 0.0));
  }
}

TEST_P(EmbeddingTest, GatherAndScatterRefuseRowsOutside) {
  const Tensor x = zeros(Shape{6, 4}, dtype()), y = zeros(Shape{1, 4}, dtype());
  for (const std::int32_t outside : {6, -1}) {
    const Tensor index = integers(Shape{1}, {outside});
    if (checks_content()) {
      EXPECT_THROW(backend().gather_rows(x, index, y), ShapeError);
      EXPECT_THROW(backend().scatter_rows(y, index, x), ShapeError);
    } else {
      backend().gather_rows(x, index, y);
      for (const double value : values(y)) EXPECT_TRUE(std::isnan(value));
      backend().scatter_rows(y, index, x);
      EXPECT_EQ(values(x), std::vector<double>(24, 0.0));
    }
  }
  EXPECT_THROW(backend().scatter_rows(y, integers(Shape{2}, {1, 2}), x), ShapeError);
  EXPECT_THROW(backend().gather_rows(zeros(Shape{6, 5}, dtype()), integers(Shape{1}, {0}), y),
               ShapeError);
}

BITFALL_BACKEND_SUITE(EmbeddingTest);

}  // namespace
}  // namespace bitfall::test
