#include <omp.h>

#include <cmath>

#include "tests/ops/attention_reference.h"
#include "tests/support/backend_fixture.h"
#include "tests/support/numeric_gradient.h"

namespace bitfall::test {
namespace {

struct Operands {
  Tensor qkv, qkv_tangent, dout, dout_tangent;

  Operands rows(std::int64_t first, std::int64_t count) const {
    return {qkv.rows(first, count), qkv_tangent.rows(first, count), dout.rows(first, count),
            dout_tangent.rows(first, count)};
  }
};

struct Results {
  AttentionTangents tangents;
  Tensor dqkv_tangent;
};

/// Derivatives of the reference's results along (qkv_tangent, dout_tangent).
struct Expected {
  Doubles out, log_sum_exp, dqkv;

  Expected(const Sample& s, const Operands& operands) {
    const Doubles qkv = values(operands.qkv), dout = values(operands.dout);
    const auto results = [&](const Doubles& operands_in_a_row) {
      const std::vector<Doubles> parts = split(operands_in_a_row, {qkv.size(), dout.size()});
      const Reference reference(s, parts[0], &parts[1]);
      return join({reference.out, reference.log_sum_exp, reference.dqkv});
    };
    const Doubles direction = join({values(operands.qkv_tangent), values(operands.dout_tangent)});
    const std::size_t scores = static_cast<std::size_t>(s.tokens() * s.shape.num_attention_heads);
    const std::vector<Doubles> parts = split(numeric_tangent(results, join({qkv, dout}), direction),
                                             {dout.size(), scores, qkv.size()});
    out = parts[0];
    log_sum_exp = parts[1];
    dqkv = parts[2];
  }

 private:
  static Doubles join(const std::vector<Doubles>& parts) {
    Doubles all;
    for (const Doubles& part : parts) all.insert(all.end(), part.begin(), part.end());
    return all;
  }
  static std::vector<Doubles> split(const Doubles& all, const std::vector<std::size_t>& sizes) {
    std::vector<Doubles> parts;
    auto begin = all.begin();
    for (const std::size_t size : sizes) {
      const auto end = begin + static_cast<std::ptrdiff_t>(size);
      parts.emplace_back(begin, end);
      begin = end;
    }
    return parts;
  }
};

class AttentionTangentTest : public BackendTest {
 protected:
  Operands random_operands(const Sample& s) {
    const Shape qkv{s.tokens(), 3 * s.hidden()}, out{s.tokens(), s.hidden()};
    return {random(qkv, dtype()), random(qkv, dtype()), random(out, dtype()), random(out, dtype())};
  }

  Results run(const Sample& s, const Operands& operands) {
    const Shape out{s.tokens(), s.hidden()}, scores{s.tokens(), s.shape.num_attention_heads};
    const Results r{{operands.qkv, operands.qkv_tangent, zeros(out, dtype()), zeros(out, dtype()),
                     zeros(scores, DType::f32), zeros(scores, DType::f32)},
                    zeros(operands.qkv.shape, dtype())};
    const std::vector<std::int32_t> list = s.starts();
    const Tensor starts = integers({static_cast<std::int64_t>(list.size())}, list);
    AttentionShape shape = s.shape;
    if (!s.key_lengths.empty()) {
      shape.key_lengths = integers({static_cast<std::int64_t>(s.lengths.size())}, s.key_lengths);
    }
    backend().attention_forward(shape, operands.qkv, starts, {}, {}, r.tangents.out,
                                r.tangents.log_sum_exp);
    backend().attention_forward_tangent(shape, r.tangents, starts);
    backend().attention_backward_tangent(shape, r.tangents, operands.dout, operands.dout_tangent,
                                         starts, r.dqkv_tangent);
    return r;
  }

  void expect_reference(const Sample& s) {
    SCOPED_TRACE(concat(s.shape.num_attention_heads, " heads of ", s.shape.head_size));
    const Operands operands = random_operands(s);
    const Results r = run(s, operands);
    const Expected expected(s, operands);
    EXPECT_TRUE(close(r.tangents.log_sum_exp_tangent, expected.log_sum_exp, {1e-5, 1e-5}));
    const double rounding = dtype() == DType::f32 ? 4e-6 : dtype() == DType::f16 ? 2e-3 : 2e-2;
    for (std::size_t b = 0; b < s.lengths.size(); ++b) {
      EXPECT_LT(relative_error(s, b, r.tangents.out_tangent, expected.out), rounding)
          << "out, sequence " << b;
      EXPECT_LT(relative_error(s, b, r.dqkv_tangent, expected.dqkv), rounding)
          << "dqkv, sequence " << b;
    }
  }

  void expect_same_rows(const Results& alone, const Results& together, std::int64_t first) {
    const AttentionTangents &a = alone.tangents, &b = together.tangents;
    const std::int64_t count = a.qkv.shape[0];
    EXPECT_TRUE(identical(a.out_tangent, b.out_tangent.rows(first, count)));
    EXPECT_TRUE(identical(a.log_sum_exp_tangent, b.log_sum_exp_tangent.rows(first, count)));
    EXPECT_TRUE(identical(alone.dqkv_tangent, together.dqkv_tangent.rows(first, count)));
  }
};

TEST_P(AttentionTangentTest, MatchesTheDerivativeOfTheReferenceOnMixedLengths) {
  expect_reference(make_sample(2, 32, {1, 65, 2, 15, 16, 17, 31}, 0.0f));
  expect_reference(make_sample(1, 64, {130, 20}, 0.0f));
}

TEST_P(AttentionTangentTest, MatchesTheDerivativeOfTheReferenceForAnyHeadSize) {
  for (const std::int64_t head_size : {1, 7, 8, 40, 128}) {
    expect_reference(make_sample(2, head_size, {33, 1, 40}, 0.0f));
  }
}

TEST_P(AttentionTangentTest, TokensBehindTheKeyLengthAttendButAreNotAttendedTo) {
  Sample s = make_sample(2, 32, {40, 1, 70, 16, 33}, 0.0f);
  s.key_lengths = {7, 1, 69, 16, 1};
  expect_reference(s);
}

TEST_P(AttentionTangentTest, NeighboursAndThreadsDoNotChangeASequence) {
  const Sample packed = make_sample(3, 32, {21, 130, 6, 47}, 0.0f);
  const Operands operands = random_operands(packed);
  const Results together = run(packed, operands);
  const int threads = omp_get_max_threads();
  for (const int other : {1, 3}) {
    omp_set_num_threads(other);
    for (std::size_t b = 0; b < packed.lengths.size(); ++b) {
      const Sample one = make_sample(3, 32, {packed.lengths[b]}, 0.0f);
      const std::int64_t first = packed.starts()[b];
      expect_same_rows(run(one, operands.rows(first, packed.lengths[b])), together, first);
    }
  }
  omp_set_num_threads(threads);
}

TEST_P(AttentionTangentTest, LargeScoresDoNotOverflow) {
  const Sample s = make_sample(1, 32, {20}, 0.0f);
  Operands operands = random_operands(s);
  operands.qkv = random(operands.qkv.shape, dtype(), 20.0);
  const Results r = run(s, operands);
  for (const Tensor& tensor :
       {r.tangents.out_tangent, r.tangents.log_sum_exp_tangent, r.dqkv_tangent})
    for (const double value : values(tensor)) EXPECT_TRUE(std::isfinite(value));
}

TEST_P(AttentionTangentTest, EmptySequencesAndBatchesAreNoWork) {
  for (const Sample& s : {make_sample(2, 8, {0, 5, 0}, 0.0f), make_sample(2, 8, {0}, 0.0f)}) {
    for (const double value : values(run(s, random_operands(s)).dqkv_tangent))
      EXPECT_TRUE(std::isfinite(value));
  }
}

TEST_P(AttentionTangentTest, RefusesWhatDoesNotFit) {
  const AttentionShape shape{2, 4};
  const Tensor wide = zeros({5, 24}, dtype()), narrow = zeros({5, 8}, dtype());
  const Tensor scores = zeros({5, 2}, DType::f32), starts = integers({3}, {0, 2, 5});
  const Tensor odd = zeros({4, 3}, dtype()), numbers = zeros({5, 24}, DType::s32);
  const AttentionTangents good{wide, wide, narrow, narrow, scores, scores};
  const auto forward = [&](const AttentionTangents& t) {
    backend().attention_forward_tangent(shape, t, starts);
  };
  const auto backward = [&](const AttentionTangents& t, const Tensor& dout, const Tensor& tangent,
                            const Tensor& result) {
    backend().attention_backward_tangent(shape, t, dout, tangent, starts, result);
  };
  EXPECT_NO_THROW(forward(good));
  EXPECT_NO_THROW(backward(good, narrow, narrow, wide));
  for (Tensor AttentionTangents::*member :
       {&AttentionTangents::qkv, &AttentionTangents::qkv_tangent, &AttentionTangents::out,
        &AttentionTangents::out_tangent, &AttentionTangents::log_sum_exp,
        &AttentionTangents::log_sum_exp_tangent}) {
    for (const Tensor& bad : {odd, Tensor{}}) {
      AttentionTangents t = good;
      t.*member = bad;
      EXPECT_THROW(forward(t), ShapeError);
      EXPECT_THROW(backward(t, narrow, narrow, wide), ShapeError);
    }
  }
  AttentionTangents t = good;
  t.qkv_tangent = numbers;
  EXPECT_THROW(forward(t), UnsupportedError);
  EXPECT_THROW(backward(good, odd, narrow, wide), ShapeError);
  EXPECT_THROW(backward(good, narrow, odd, wide), ShapeError);
  EXPECT_THROW(backward(good, narrow, narrow, narrow), ShapeError);
  EXPECT_THROW(backward(good, narrow, narrow, numbers), UnsupportedError);
  EXPECT_THROW(backend().attention_forward_tangent(shape, good, {}), ShapeError);
  EXPECT_THROW(backend().attention_forward_tangent({3, 4}, good, starts), ShapeError);
  const auto refused = [&] {
    backend().attention_forward_tangent(shape, good, integers({3}, {0, 6, 5}));
  };
  if (checks_content()) {
    EXPECT_THROW(refused(), ShapeError);
  } else {
    EXPECT_NO_THROW(refused());
  }
}

BITFALL_BACKEND_SUITE(AttentionTangentTest);

}  // namespace
}  // namespace bitfall::test
