#include <algorithm>
#include <cmath>
#include <random>

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

  /// Gradients that are whole numbers, as many rows as `id` needs.
  EmbeddingTables gradients(const EmbeddingIds& id, std::int64_t hidden) {
    const auto table = [&](const Tensor& index) {
      const std::vector<double> row = values(index);
      const auto rows = static_cast<std::int64_t>(*std::max_element(row.begin(), row.end())) + 1;
      return whole_numbers(Shape{rows, hidden}, DType::f32);
    };
    return {table(id.input_ids), table(id.position_ids), table(id.token_type_ids)};
  }

  /// -8 ... 8: sums of them are exact in any order.
  Tensor whole_numbers(const Shape& shape, DType dtype) {
    std::vector<double> data(static_cast<std::size_t>(shape.numel()));
    for (std::size_t i = 0; i < data.size(); ++i) data[i] = static_cast<double>(i * i % 17) - 8;
    return floats(shape, dtype, data);
  }

  static void add_in_token_order(const EmbeddingIds& id, const Tensor& dy,
                                 const EmbeddingTables& sums) {
    const std::vector<double> gradient = values(dy);
    const std::int64_t hidden = dy.shape[1];
    const auto add = [&](const Tensor& index, const Tensor& sum) {
      for (std::int64_t i = 0; i < dy.numel(); ++i) {
        sum.as<float>()[index.as<std::int32_t>()[i / hidden] * hidden + i % hidden] +=
            static_cast<float>(gradient[static_cast<std::size_t>(i)]);
      }
    };
    add(id.input_ids, sums.word);
    add(id.position_ids, sums.position);
    add(id.token_type_ids, sums.token_type);
  }

  void expect_exact_sums(const EmbeddingIds& id, std::int64_t hidden) {
    const Tensor dy = whole_numbers(Shape{id.input_ids.numel(), hidden}, dtype());
    const EmbeddingTables sums = gradients(id, hidden), expected = gradients(id, hidden);
    add_in_token_order(id, dy, expected);
    backend().embedding_backward(id, dy, sums);
    EXPECT_TRUE(identical(sums.word, expected.word)) << hidden;
    EXPECT_TRUE(identical(sums.position, expected.position)) << hidden;
    EXPECT_TRUE(identical(sums.token_type, expected.token_type)) << hidden;
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

TEST_P(EmbeddingTest, BackwardAddsToRows) {
  for (const std::int64_t hidden : {1, 7, 8, 33, 136, 384}) {
    expect_exact_sums(ids(130, 11), hidden);
    expect_exact_sums(ids(1, 11), hidden);
  }
}

TEST_P(EmbeddingTest, BackwardAddsManyTokensToARow) {
  for (const std::int64_t hidden : {5, 24}) {
    // 1, 2, 3, ... tokens of ids 0, 1, 2, ...: runs that begin and end anywhere in a sorted list.
    std::vector<std::int32_t> runs, alike, frequent, blocks;
    for (std::int32_t id = 0; id < 70; ++id) {
      for (std::int32_t i = 0; i <= id; ++i) runs.push_back(id);
    }
    for (std::int32_t t = 0; t < static_cast<std::int32_t>(runs.size()); ++t) {
      alike.push_back(1);
      frequent.push_back(t % 97 == 0 ? t % 70 : 3);
      blocks.push_back(t / 64);  // as long as the CUDA backend's pieces, or multiples
    }
    const auto expect = [&](const std::vector<std::int32_t>& word,
                            const std::vector<std::int32_t>& position,
                            const std::vector<std::int32_t>& type) {
      const Shape shape{static_cast<std::int64_t>(word.size())};
      expect_exact_sums({integers(shape, word), integers(shape, position), integers(shape, type)},
                        hidden);
    };
    expect(runs, frequent, alike);
    expect(blocks, runs, alike);
    std::shuffle(runs.begin(), runs.end(), std::mt19937{1});
    expect(frequent, runs, blocks);
  }
}

TEST_P(EmbeddingTest, BackwardGivesTheSameBitsAgain) {
  const EmbeddingIds id = ids(300, 11);
  const Tensor dy = random(Shape{300, 40}, dtype());
  const auto run = [&] {
    const EmbeddingTables sums = gradients(id, 40);
    backend().embedding_backward(id, dy, sums);
    return sums;
  };
  const EmbeddingTables once = run(), again = run();
  EXPECT_TRUE(identical(once.word, again.word));
  EXPECT_TRUE(identical(once.position, again.position));
  EXPECT_TRUE(identical(once.token_type, again.token_type));
  // One by one in token order.
  const EmbeddingTables expected = gradients(id, 40);
  add_in_token_order(id, dy, expected);
  EXPECT_TRUE(close(once.word, values(expected.word), {1e-4, 1e-5}));
  EXPECT_TRUE(close(once.position, values(expected.position), {1e-4, 1e-5}));
  EXPECT_TRUE(close(once.token_type, values(expected.token_type), {1e-4, 1e-5}));
  if (GetParam().device == Device::cpu) {
    EXPECT_TRUE(identical(once.word, expected.word));
    EXPECT_TRUE(identical(once.position, expected.position));
    EXPECT_TRUE(identical(once.token_type, expected.token_type));
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
