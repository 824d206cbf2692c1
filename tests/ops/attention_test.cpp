#include <omp.h>

#include <cmath>

#include "tests/ops/attention_reference.h"
#include "tests/support/backend_fixture.h"
#include "tests/support/numeric_gradient.h"

namespace bitfall::test {
namespace {

struct Results {
  Tensor out, log_sum_exp, dqkv;
};

class AttentionTest : public BackendTest {
 protected:
  Tensor random_qkv(const Sample& s) { return random({s.tokens(), 3 * s.hidden()}, dtype()); }
  Tensor random_dout(const Sample& s) { return random({s.tokens(), s.hidden()}, dtype()); }

  Results run(const Sample& s, const Tensor& qkv, const Tensor& dout) {
    const std::vector<std::int32_t> list = s.starts();
    const Tensor starts = integers({static_cast<std::int64_t>(list.size())}, list);
    const Tensor keys = integers({static_cast<std::int64_t>(s.keys.size())}, s.keys);
    const Results r{zeros({s.tokens(), s.hidden()}, dtype()),
                    zeros({s.tokens(), s.shape.num_attention_heads}, DType::f32),
                    zeros(qkv.shape, dtype())};
    AttentionShape shape = s.shape;
    if (!s.key_lengths.empty()) shape.key_lengths = integers({keys.numel()}, s.key_lengths);
    backend().attention_forward(shape, qkv, starts, keys, s.dropout, r.out, r.log_sum_exp);
    backend().attention_backward(shape, dout, qkv, r.out, r.log_sum_exp, starts, keys, s.dropout,
                                 r.dqkv);
    return r;
  }

  void expect_reference(const Sample& s) {
    SCOPED_TRACE(concat(s.shape.num_attention_heads, " heads of ", s.shape.head_size));
    const Tensor qkv = random_qkv(s), dout = random_dout(s);
    const Results r = run(s, qkv, dout);
    const Doubles qkv_values = values(qkv), dout_values = values(dout);
    const Reference expected(s, qkv_values, &dout_values);
    EXPECT_TRUE(close(r.log_sum_exp, expected.log_sum_exp, {2e-6, 1e-6}));
    // Outputs shrink with the length, so each sequence is measured against its own size.
    const double rounding = dtype() == DType::f32 ? 2e-6 : dtype() == DType::f16 ? 1e-3 : 1.5e-2;
    // Tensor cores take probabilities in the compute dtype, too.
    const double allowed = GetParam().device == Device::cuda ? 2 * rounding : rounding;
    for (std::size_t b = 0; b < s.lengths.size(); ++b) {
      EXPECT_LT(relative_error(s, b, r.out, expected.out), allowed) << "out, sequence " << b;
      EXPECT_LT(relative_error(s, b, r.dqkv, expected.dqkv), allowed) << "dqkv, sequence " << b;
    }
  }

  /// Where the content of tensors is not looked at, it must at least do no harm.
  template <typename Call>
  void expect_refused_content(const Call& call) {
    if (checks_content()) {
      EXPECT_THROW(call(), ShapeError);
    } else {
      EXPECT_NO_THROW(call());
    }
  }

  static void expect_finite(const Results& r) {
    for (const Tensor& tensor : {r.out, r.log_sum_exp, r.dqkv})
      for (const double value : values(tensor)) EXPECT_TRUE(std::isfinite(value));
  }
};

TEST(AttentionReference, GradientIsThatOfTheForwardPass) {
  for (const float probability : {0.0f, 0.3f}) {
    const Sample s = make_sample(2, 3, {4, 1, 2}, probability);
    Doubles qkv(static_cast<std::size_t>(s.tokens() * 3 * s.hidden()));
    Doubles dout(static_cast<std::size_t>(s.tokens() * s.hidden()));
    for (std::size_t i = 0; i < qkv.size(); ++i) qkv[i] = std::sin(1.0 + 1.7 * i);
    for (std::size_t i = 0; i < dout.size(); ++i) dout[i] = std::cos(2.0 + 0.9 * i);
    const auto loss = [&](const Doubles& x) {
      return weighted_sum(Reference(s, x, nullptr).out, dout);
    };
    EXPECT_TRUE(close(Reference(s, qkv, &dout).dqkv, numeric_gradient(loss, qkv), {1e-8, 1e-8}));
  }
}

TEST_P(AttentionTest, MatchesReferenceOnMixedLengths) {
  for (const std::int64_t head_size : {32, 64}) {
    expect_reference(make_sample(2, head_size, {1, 128, 2, 15, 300, 16, 17, 130, 31}, 0.1f));
  }
}

TEST_P(AttentionTest, MatchesReferenceForAnyHeadSize) {
  for (const std::int64_t head_size : {1, 7, 8, 40, 128}) {
    expect_reference(make_sample(3, head_size, {33, 1, 130}, 0.25f));
    expect_reference(make_sample(1, head_size, {5, 18}, 0.0f));
  }
}

TEST_P(AttentionTest, TokensBehindTheKeyLengthAttendButAreNotAttendedTo) {
  Sample s = make_sample(2, 32, {40, 1, 130, 16, 33}, 0.1f);
  s.key_lengths = {7, 1, 129, 16, 1};
  expect_reference(s);
}

TEST_P(AttentionTest, DropoutFollowsDropoutBits) {
  // With equal scores and v the identity, out[q, k] is the multiplier of (q, k) / length.
  const std::int32_t length = 40;
  const Sample s = make_sample(2, 40, {length, length}, 0.4f);
  const Tensor qkv = zeros({s.tokens(), 3 * s.hidden()}, dtype());
  visit_dtype(dtype(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    for (std::int64_t row = 0; row < s.tokens(); ++row)
      for (std::int64_t a = 0; a < 2; ++a)
        qkv.as<T>()[(row * 3 + 2) * s.hidden() + a * 40 + row % length] = from_float<T>(1.0f);
  });
  const Doubles out = values(run(s, qkv, random_dout(s)).out);
  for (std::size_t b = 0; b < 2; ++b)
    for (std::int64_t a = 0; a < 2; ++a)
      for (std::int64_t q = 0; q < length; ++q)
        for (std::int64_t k = 0; k < length; ++k) {
          const auto row = static_cast<std::int64_t>(b) * length + q;
          const double seen = out[static_cast<std::size_t>(row * s.hidden() + a * 40 + k)];
          ASSERT_NEAR(seen * length, multiplier(s, b, a, q, k), 2e-2) << b << " " << a << " " << q;
        }
}

TEST_P(AttentionTest, NeighboursAndThreadsDoNotChangeASequence) {
  const Sample packed = make_sample(3, 32, {21, 130, 6, 47}, 0.1f);
  const Tensor qkv = random_qkv(packed), dout = random_dout(packed);
  const Results together = run(packed, qkv, dout);
  const int threads = omp_get_max_threads();
  for (const int other : {1, 3, 5}) {
    omp_set_num_threads(other);
    for (std::size_t b = 0; b < packed.lengths.size(); ++b) {
      Sample one = make_sample(3, 32, {packed.lengths[b]}, 0.1f);
      one.keys = {packed.keys[b]};
      const std::int64_t first = packed.starts()[b], count = packed.lengths[b];
      const Results alone = run(one, qkv.rows(first, count), dout.rows(first, count));
      EXPECT_TRUE(identical(alone.out, together.out.rows(first, count)));
      EXPECT_TRUE(identical(alone.log_sum_exp, together.log_sum_exp.rows(first, count)));
      EXPECT_TRUE(identical(alone.dqkv, together.dqkv.rows(first, count)));
    }
  }
  omp_set_num_threads(threads);
}

TEST_P(AttentionTest, LargeScoresDoNotOverflow) {
  const Sample s = make_sample(1, 32, {20}, 0.0f);
  const Tensor qkv = random({s.tokens(), 3 * s.hidden()}, dtype(), 30.0);
  const Results r = run(s, qkv, random_dout(s));
  const Doubles qkv_values = values(qkv);
  // Beyond the range of a plain exponential, so the double reference is out of place here.
  for (const double value : values(r.log_sum_exp)) EXPECT_TRUE(std::isfinite(value));
  for (const double value : values(r.out)) EXPECT_LE(std::fabs(value), 150);
  for (const double value : values(r.dqkv)) EXPECT_TRUE(std::isfinite(value));
}

TEST_P(AttentionTest, NanReachesItsOwnHeadOnly) {
  const Sample s = make_sample(2, 8, {3, 4}, 0.0f);
  const Tensor qkv = random_qkv(s);
  visit_dtype(dtype(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    qkv.as<T>()[8] = from_float<T>(NAN);  // q of token 0, head 1
  });
  const Results r = run(s, qkv, random_dout(s));
  const Doubles out = values(r.out), dqkv = values(r.dqkv);
  for (std::size_t i = 0; i < out.size(); ++i) EXPECT_EQ(std::isnan(out[i]), i >= 8 && i < 16) << i;
  EXPECT_TRUE(std::isnan(dqkv[16 + 8]));  // k of token 0, head 1
  for (std::size_t i = 0; i < 8; ++i) EXPECT_FALSE(std::isnan(dqkv[16 + i]));
  for (std::size_t i = 3 * 48; i < dqkv.size(); ++i) EXPECT_FALSE(std::isnan(dqkv[i]));
}

TEST_P(AttentionTest, EmptySequencesAndBatchesAreNoWork) {
  const Sample s = make_sample(2, 8, {0, 5, 0}, 0.1f);
  expect_finite(run(s, random_qkv(s), random_dout(s)));
  const Sample none = make_sample(2, 8, {0}, 0.1f);
  expect_finite(run(none, random_qkv(none), random_dout(none)));
}

TEST_P(AttentionTest, RefusesWhatDoesNotFit) {
  const AttentionShape shape{2, 4};
  const Tensor qkv = zeros({5, 24}, dtype()), out = zeros({5, 8}, dtype());
  const Tensor lse = zeros({5, 2}, DType::f32), keys = integers({2}, {1, 2});
  const Tensor starts = integers({3}, {0, 2, 5});
  const Dropout off, on{0.1f, 1, 1};
  const auto forward = [&](const AttentionShape& s, const Tensor& x, const Tensor& sequence_starts,
                           const Tensor& sample_keys, const Dropout& dropout, const Tensor& y,
                           const Tensor& log_sum_exp) {
    backend().attention_forward(s, x, sequence_starts, sample_keys, dropout, y, log_sum_exp);
  };
  EXPECT_NO_THROW(forward(shape, qkv, starts, keys, on, out, lse));
  EXPECT_NO_THROW(forward(shape, qkv, starts, {}, off, out, lse));
  EXPECT_THROW(forward(shape, qkv, starts, {}, on, out, lse), ShapeError);
  EXPECT_THROW(forward({0, 4}, qkv, starts, keys, off, out, lse), ShapeError);
  EXPECT_THROW(forward({3, 4}, qkv, starts, keys, off, out, lse), ShapeError);
  EXPECT_THROW(forward(shape, out, starts, keys, off, out, lse), ShapeError);
  EXPECT_THROW(forward(shape, qkv, starts, keys, off, qkv, lse), ShapeError);
  EXPECT_THROW(forward(shape, qkv, starts, keys, off, out, out), ShapeError);
  EXPECT_THROW(forward(shape, qkv, {}, keys, off, out, lse), ShapeError);
  for (const std::vector<std::int32_t>& bad :
       {std::vector<std::int32_t>{0, 6, 5}, {0, 2, 6}, {1, 2, 5}, {0, -1, 5}}) {
    expect_refused_content([&] { forward(shape, qkv, integers({3}, bad), keys, off, out, lse); });
  }
  EXPECT_THROW(forward(shape, zeros({5, 24}, DType::s32), starts, keys, off, out, lse),
               UnsupportedError);
  for (const std::vector<std::int32_t>& bad : {std::vector<std::int32_t>{0, 3}, {3, 3}, {2, -1}}) {
    expect_refused_content([&] {
      forward({2, 4, integers({2}, bad)}, qkv, starts, keys, off, out, lse);
    });
  }
  EXPECT_THROW(forward({2, 4, integers({1}, {2})}, qkv, starts, keys, off, out, lse), ShapeError);
  const Tensor dout = zeros({4, 8}, dtype());
  EXPECT_THROW(backend().attention_backward(shape, dout, qkv, out, lse, starts, keys, off, qkv),
               ShapeError);
  EXPECT_THROW(backend().attention_backward(shape, out, qkv, out, lse, starts, keys, off, out),
               ShapeError);
}

BITFALL_BACKEND_SUITE(AttentionTest);

}  // namespace
}  // namespace bitfall::test
