// Attention as defined, in double precision, and the packed batches its tests use.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#include "core/backend.h"
#include "tests/support/compare.h"

namespace bitfall::test {

using Doubles = std::vector<double>;

/// A packed batch for one attention call.
struct Sample {
  AttentionShape shape;
  std::vector<std::int32_t> lengths, keys;
  Dropout dropout;
  std::vector<std::int32_t> key_lengths = {};  ///< empty: all

  std::int64_t hidden() const { return shape.num_attention_heads * shape.head_size; }
  std::vector<std::int32_t> starts() const {
    std::vector<std::int32_t> result{0};
    for (const std::int32_t length : lengths) result.push_back(result.back() + length);
    return result;
  }
  std::int64_t tokens() const { return starts().back(); }
  std::int32_t key_length(std::size_t b) const {
    return key_lengths.empty() ? lengths[b] : key_lengths[b];
  }
};

inline Sample make_sample(std::int64_t heads, std::int64_t head_size,
                          std::vector<std::int32_t> lengths, float probability) {
  Sample sample{{heads, head_size}, std::move(lengths), {}, {probability, 77, 5}};
  for (std::size_t b = 0; b < sample.lengths.size(); ++b)
    sample.keys.push_back(static_cast<std::int32_t>(900 - 7 * b));
  return sample;
}

inline double multiplier(const Sample& s, std::size_t b, std::int64_t a, std::int64_t q,
                         std::int64_t k) {
  if (!s.dropout.enabled()) return 1;
  const auto position = static_cast<std::uint32_t>((a << 16) | q);
  const std::uint32_t bits = dropout_bits(s.dropout, static_cast<std::uint32_t>(s.keys[b]),
                                          position, static_cast<std::uint32_t>(k));
  return bits < s.dropout.threshold() ? 0 : s.dropout.scale();
}

/// The definition in double precision. With `dout`, also the gradient of sum(out * dout).
struct Reference {
  Doubles out, log_sum_exp, dqkv;

  Reference(const Sample& s, const Doubles& qkv, const Doubles* dout) : s_(s), qkv_(qkv) {
    out.assign(static_cast<std::size_t>(s.tokens() * s.hidden()), 0);
    log_sum_exp.assign(static_cast<std::size_t>(s.tokens() * s.shape.num_attention_heads), 0);
    if (dout != nullptr) dqkv.assign(qkv.size(), 0);
    for (std::size_t b = 0; b < s.lengths.size(); ++b)
      for (std::int64_t a = 0; a < s.shape.num_attention_heads; ++a)
        for (std::int64_t q = 0; q < s.lengths[b]; ++q) query(b, a, q, dout);
  }

 private:
  /// Element d of part 0 (q), 1 (k) or 2 (v).
  std::size_t at(std::int64_t row, int part, std::int64_t a, std::int64_t d) const {
    return static_cast<std::size_t>((row * 3 + part) * s_.hidden() + a * s_.shape.head_size + d);
  }

  void query(std::size_t b, std::int64_t a, std::int64_t q, const Doubles* dout) {
    const std::int64_t first = s_.starts()[b], head = s_.shape.head_size;
    const double scale = 1 / std::sqrt(static_cast<double>(head));
    const auto n = static_cast<std::size_t>(s_.key_length(b));
    Doubles p(n), kept(n), dp(n, 0);
    double sum = 0;
    for (std::size_t k = 0; k < n; ++k) {
      double score = 0;
      for (std::int64_t d = 0; d < head; ++d)
        score += qkv_[at(first + q, 0, a, d)] * qkv_[at(first + k, 1, a, d)];
      sum += p[k] = std::exp(score * scale);
    }
    log_sum_exp[static_cast<std::size_t>((first + q) * s_.shape.num_attention_heads + a)] =
        std::log(sum);
    const std::int64_t out_row = (first + q) * s_.hidden() + a * head;
    double delta = 0;
    for (std::size_t k = 0; k < n; ++k) {
      p[k] /= sum;
      kept[k] = multiplier(s_, b, a, q, k);
      for (std::int64_t d = 0; d < head; ++d) {
        const double v = qkv_[at(first + k, 2, a, d)];
        out[static_cast<std::size_t>(out_row + d)] += p[k] * kept[k] * v;
        if (dout == nullptr) continue;
        const double gradient = (*dout)[static_cast<std::size_t>(out_row + d)];
        dp[k] += kept[k] * gradient * v;
        dqkv[at(first + k, 2, a, d)] += p[k] * kept[k] * gradient;
      }
      delta += p[k] * dp[k];
    }
    if (dout == nullptr) return;
    for (std::size_t k = 0; k < n; ++k) {
      const double dscore = p[k] * (dp[k] - delta) * scale;
      for (std::int64_t d = 0; d < head; ++d) {
        dqkv[at(first + q, 0, a, d)] += dscore * qkv_[at(first + k, 1, a, d)];
        dqkv[at(first + k, 1, a, d)] += dscore * qkv_[at(first + q, 0, a, d)];
      }
    }
  }

  const Sample& s_;
  const Doubles& qkv_;
};

/// Root mean square difference of a sequence's rows, relative to what is expected of them.
inline double relative_error(const Sample& s, std::size_t b, const Tensor& actual,
                             const Doubles& expected) {
  const Doubles rows = values(actual.rows(s.starts()[b], s.lengths[b]));
  const auto first = static_cast<std::size_t>(s.starts()[b] * actual.shape[1]);
  double error = 0, size = 0;
  for (std::size_t i = 0; i < rows.size(); ++i) {
    error += std::pow(rows[i] - expected[first + i], 2);
    size += std::pow(expected[first + i], 2);
  }
  return std::sqrt(error / size);
}

}  // namespace bitfall::test
