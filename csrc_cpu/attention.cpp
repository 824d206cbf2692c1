#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <span>
#include <vector>

#include "core/checks.h"
#include "core/operation_checks.h"
#include "csrc_cpu/cpu_backend.h"

namespace bitfall {
namespace {

struct AttentionTensors {
  AttentionShape shape;
  const Tensor& qkv;
  const Tensor& sequence_starts;
  const Tensor& sample_keys;
  const Tensor& out;
  const Tensor& log_sum_exp;

  std::int64_t hidden_size() const { return shape.num_attention_heads * shape.head_size; }
  std::int64_t num_sequences() const { return sequence_starts.numel() - 1; }
  std::span<const std::int32_t> starts() const {
    return {sequence_starts.as<const std::int32_t>(),
            static_cast<std::size_t>(sequence_starts.numel())};
  }
  std::int64_t length(std::int64_t b) const { return starts()[b + 1] - starts()[b]; }
  std::int64_t key_length(std::int64_t b) const {
    return shape.key_lengths ? shape.key_lengths.as<const std::int32_t>()[b] : length(b);
  }
};

/// The dropout row of head a and query q is (a << 16) | q, so both must fit 16 bits.
void check_dropout_rows(const char* operation, const AttentionTensors& t, std::int64_t longest) {
  constexpr std::int64_t kLimit = 1 << 16;
  check<UnsupportedError>(longest <= kLimit && t.shape.num_attention_heads <= kLimit, operation,
                          " on cpu: a sequence of ", longest, " tokens and ",
                          t.shape.num_attention_heads, " heads; dropout handles up to ", kLimit,
                          " of each: shorten the sequence or switch attention dropout off");
}

/// Throws ShapeError unless `starts` rise from 0 to `tokens`; returns the longest sequence's
/// length.
std::int64_t check_starts(const char* operation, std::span<const std::int32_t> starts,
                          std::int64_t tokens) {
  check<ShapeError>(starts.front() == 0 && starts.back() == tokens, operation,
                    ": sequence_starts from ", starts.front(), " to ", starts.back(),
                    ", expected from 0 to the number of tokens, ", tokens);
  std::int64_t longest = 0;
  for (std::size_t b = 0; b + 1 < starts.size(); ++b) {
    check<ShapeError>(starts[b] <= starts[b + 1], operation, ": sequence_starts[", b + 1,
                      "] = ", starts[b + 1], ", expected at least the one before, ", starts[b]);
    longest = std::max<std::int64_t>(longest, starts[b + 1] - starts[b]);
  }
  return longest;
}

/// Throws ShapeError or UnsupportedError unless every tensor fits; returns the length of the
/// longest sequence.
std::int64_t check_attention(const char* operation, const AttentionTensors& t,
                             const Dropout& dropout) {
  check_attention(operation, t.shape, t.qkv, t.sequence_starts, t.sample_keys, dropout, t.out,
                  t.log_sum_exp);
  const std::int64_t tokens = t.qkv.shape[0];
  const std::int64_t longest = check_starts(operation, t.starts(), tokens);
  for (std::int64_t b = 0; b < t.num_sequences(); ++b) {
    check<ShapeError>(
        t.key_length(b) >= std::min<std::int64_t>(1, t.length(b)) && t.key_length(b) <= t.length(b),
        operation, ": key_lengths[", b, "] = ", t.key_length(b), ", expected 1..", t.length(b),
        ", the tokens of its sequence");
  }
  if (dropout.enabled()) check_dropout_rows(operation, t, longest);
  return longest;
}

/// Bounds of each thread's share of the units (sequence b, head a) = b * A + a: contiguous ranges
/// of nearly equal cost, the same on every call, so a head is always summed by the same thread.
std::vector<std::int64_t> partition(const AttentionTensors& t, int num_threads) {
  const std::span<const std::int32_t> starts = t.starts();
  const std::int64_t heads = t.shape.num_attention_heads;
  // Score tiles grow with the square of the length; packing and the rest with the length.
  const auto cost = [&](std::int64_t b) {
    const double length = starts[b + 1] - starts[b];
    return length * (length + 32);
  };
  double total = 0;
  for (std::int64_t b = 0; b < t.num_sequences(); ++b) total += cost(b) * heads;
  std::vector<std::int64_t> bounds{0};
  double done = 0;
  for (std::int64_t unit = 0; unit < t.num_sequences() * heads; ++unit) {
    // A unit belongs to the thread in whose share its middle falls.
    const double middle = done + cost(unit / heads) / 2;
    while (bounds.size() < static_cast<std::size_t>(num_threads) &&
           middle * num_threads >= total * static_cast<double>(bounds.size())) {
      bounds.push_back(unit);
    }
    done += cost(unit / heads);
  }
  bounds.resize(num_threads + 1, t.num_sequences() * heads);
  return bounds;
}

void* column(const Tensor& tensor, std::int64_t row, std::int64_t index) {
  return tensor.as<std::byte>() +
         (row * tensor.shape[1] + index) * static_cast<std::int64_t>(size_in_bytes(tensor.dtype));
}

/// First element of a unit in a tensor of [T, H], or of one of three such side by side.
void* head_column(const AttentionTensors& t, const Tensor& tensor, std::int64_t unit,
                  std::int64_t part = 0) {
  const std::int64_t b = unit / t.shape.num_attention_heads, a = unit % t.shape.num_attention_heads;
  return column(tensor, t.starts()[b], part * t.hidden_size() + a * t.shape.head_size);
}

AttentionHead make_head(const AttentionTensors& t, const Dropout& dropout, std::int64_t unit) {
  const std::int64_t b = unit / t.shape.num_attention_heads;
  const std::int64_t a = unit % t.shape.num_attention_heads;
  const std::int64_t hidden = t.hidden_size();
  AttentionHead head;
  head.length = t.length(b);
  head.key_length = t.key_length(b);
  head.head_size = t.shape.head_size;
  head.qkv_stride = 3 * hidden;
  head.out_stride = hidden;
  head.lse_stride = t.shape.num_attention_heads;
  head.q = head_column(t, t.qkv, unit, 0);
  head.k = head_column(t, t.qkv, unit, 1);
  head.v = head_column(t, t.qkv, unit, 2);
  head.out = head_column(t, t.out, unit);
  head.log_sum_exp = static_cast<float*>(column(t.log_sum_exp, t.starts()[b], a));
  head.dropout = dropout;
  if (dropout.enabled()) {
    head.sample_key = static_cast<std::uint32_t>(t.sample_keys.as<const std::int32_t>()[b]);
  }
  head.head = static_cast<std::uint32_t>(a);
  return head;
}

/// Where the gradients of a unit go within dqkv [T, 3H].
void set_gradients(const AttentionTensors& t, const Tensor& dqkv, std::int64_t unit,
                   AttentionHead& head) {
  head.dq = head_column(t, dqkv, unit, 0);
  head.dk = head_column(t, dqkv, unit, 1);
  head.dv = head_column(t, dqkv, unit, 2);
}

/// Calls run(unit, scratch of the thread) for every (sequence, head).
template <typename Run>
void for_each_head(const AttentionTensors& t, const ThreadScratch& scratch, const Run& run) {
  const std::vector<std::int64_t> bounds = partition(t, omp_get_max_threads());
#pragma omp parallel for schedule(static)
  for (std::size_t share = 0; share < bounds.size() - 1; ++share) {
    for (std::int64_t unit = bounds[share]; unit < bounds[share + 1]; ++unit) {
      run(unit, scratch.memory + share * scratch.bytes_per_thread);
    }
  }
}

/// The tensors of a tangent operation, twice: as they are and as tangents.
struct TangentTensors {
  Tensor no_sample_keys;
  AttentionTensors value, tangent;

  TangentTensors(const AttentionShape& shape, const AttentionTangents& t, const Tensor& starts)
      : value{shape, t.qkv, starts, no_sample_keys, t.out, t.log_sum_exp},
        tangent{shape,          t.qkv_tangent, starts,
                no_sample_keys, t.out_tangent, t.log_sum_exp_tangent} {}

  AttentionHeadTangent head(std::int64_t unit) const {
    return {make_head(value, {}, unit), make_head(tangent, {}, unit)};
  }
};

}  // namespace

void CpuBackend::attention_forward(const AttentionShape& shape, const Tensor& qkv,
                                   const Tensor& sequence_starts, const Tensor& sample_keys,
                                   const Dropout& dropout, const Tensor& out,
                                   const Tensor& log_sum_exp) {
  const AttentionTensors t{shape, qkv, sequence_starts, sample_keys, out, log_sum_exp};
  const std::int64_t longest = check_attention("attention_forward", t, dropout);
  const AttentionKernels& kernels = *kernels_.attention;
  const ThreadScratch memory =
      thread_scratch(kernels.forward_scratch_bytes(qkv.dtype, longest, shape.head_size));
  for_each_head(t, memory, [&](std::int64_t unit, std::byte* own) {
    kernels.forward(qkv.dtype, make_head(t, dropout, unit), own);
  });
}

void CpuBackend::attention_backward(const AttentionShape& shape, const Tensor& dout,
                                    const Tensor& qkv, const Tensor& out, const Tensor& log_sum_exp,
                                    const Tensor& sequence_starts, const Tensor& sample_keys,
                                    const Dropout& dropout, const Tensor& dqkv) {
  const AttentionTensors t{shape, qkv, sequence_starts, sample_keys, out, log_sum_exp};
  const std::int64_t longest = check_attention("attention_backward", t, dropout);
  const std::int64_t tokens = qkv.shape[0], hidden = t.hidden_size();
  check_tensor("attention_backward", "dout", dout, qkv.dtype, {tokens, hidden});
  check_tensor("attention_backward", "dqkv", dqkv, qkv.dtype, {tokens, 3 * hidden});
  const AttentionKernels& kernels = *kernels_.attention;
  const ThreadScratch memory =
      thread_scratch(kernels.backward_scratch_bytes(qkv.dtype, longest, shape.head_size));
  for_each_head(t, memory, [&](std::int64_t unit, std::byte* own) {
    AttentionHead head = make_head(t, dropout, unit);
    head.dout = head_column(t, dout, unit);
    set_gradients(t, dqkv, unit, head);
    kernels.backward(qkv.dtype, head, own);
  });
}

void CpuBackend::attention_forward_tangent(const AttentionShape& shape,
                                           const AttentionTangents& tangents,
                                           const Tensor& sequence_starts) {
  constexpr const char* kName = "attention_forward_tangent";
  check_attention_tangents(kName, shape, tangents, sequence_starts);
  const TangentTensors t(shape, tangents, sequence_starts);
  const std::int64_t longest = check_attention(kName, t.value, {});
  const AttentionTangentKernels& kernels = *kernels_.attention_tangent;
  const DType dtype = tangents.qkv.dtype;
  const ThreadScratch memory =
      thread_scratch(kernels.forward_scratch_bytes(dtype, longest, shape.head_size));
  for_each_head(t.value, memory, [&](std::int64_t unit, std::byte* own) {
    kernels.forward(dtype, t.head(unit), own);
  });
}

void CpuBackend::attention_backward_tangent(const AttentionShape& shape,
                                            const AttentionTangents& tangents, const Tensor& dout,
                                            const Tensor& dout_tangent,
                                            const Tensor& sequence_starts,
                                            const Tensor& dqkv_tangent) {
  constexpr const char* kName = "attention_backward_tangent";
  check_attention_tangents(kName, shape, tangents, sequence_starts);
  check_attention_backward_tangent(tangents, dout, dout_tangent, dqkv_tangent);
  const TangentTensors t(shape, tangents, sequence_starts);
  const std::int64_t longest = check_attention(kName, t.value, {});
  const AttentionTangentKernels& kernels = *kernels_.attention_tangent;
  const DType dtype = tangents.qkv.dtype;
  const ThreadScratch memory =
      thread_scratch(kernels.backward_scratch_bytes(dtype, longest, shape.head_size));
  for_each_head(t.value, memory, [&](std::int64_t unit, std::byte* own) {
    AttentionHeadTangent head = t.head(unit);
    head.value.dout = head_column(t.value, dout, unit);
    head.tangent.dout = head_column(t.value, dout_tangent, unit);
    set_gradients(t.value, dqkv_tangent, unit, head.tangent);
    kernels.backward(dtype, head, own);
  });
}

}  // namespace bitfall
