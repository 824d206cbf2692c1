#include "core/operation_checks.h"

#include <algorithm>

#include "core/checks.h"
#include "core/error.h"

namespace bitfall {
namespace {

void check_row_keys(const char* operation, const Tensor& row_keys, std::int64_t rows,
                    const Dropout& input_dropout, const Dropout& output_dropout) {
  if (input_dropout.enabled() || output_dropout.enabled())
    check_tensor(operation, "row_keys", row_keys, DType::s32, Shape{rows, 2});
}

template <typename Range>
void check_range(const char* operation, const Range& range, std::int64_t numel) {
  check<ShapeError>(range.begin >= 0 && range.numel >= 0 && range.begin <= numel &&
                        range.numel <= numel - range.begin,
                    operation, ": range of ", range.numel, " elements at ", range.begin,
                    " is outside of ", numel, " elements");
}

void check_logits(const char* operation, const Tensor& logits) {
  check_rank(operation, "logits", logits, 2);
  check_floating(operation, "logits", logits);
  check<ShapeError>(logits.numel() > 0, operation, ": logits have shape ", logits.shape.to_string(),
                    ", expected at least one row");
}

void check_span_logits(const char* operation, const Tensor& logits, const Tensor& sequence_starts) {
  check_floating(operation, "logits", logits);
  check_rank(operation, "logits", logits, 2);
  check_rank(operation, "sequence_starts", sequence_starts, 1);
  check_dtype(operation, "sequence_starts", sequence_starts, DType::s32);
  check<ShapeError>(logits.shape[1] == 2 && sequence_starts.numel() > 1, operation,
                    ": logits have shape ", logits.shape.to_string(), " and sequence_starts ",
                    sequence_starts.shape.to_string(),
                    ", expected [tokens, 2] and at least one sequence");
}

/// What both tangents of layer norm read: `sum` gives the shape.
void check_norm_tangent(const char* operation, const Tensor& sum, const Tensor& mean_rstd,
                        const Tensor& gamma, const Tensor& sum_tangent,
                        const Tensor& gamma_tangent) {
  check_rank(operation, "sum", sum, 2);
  check_floating(operation, "sum", sum);
  const Shape columns{sum.shape[1]};
  check_tensor(operation, "sum", sum, sum.dtype, sum.shape);
  check_tensor(operation, "mean_rstd", mean_rstd, DType::f32, Shape{sum.shape[0], 2});
  check_tensor(operation, "gamma", gamma, sum.dtype, columns);
  check_tensor(operation, "sum_tangent", sum_tangent, sum.dtype, sum.shape);
  if (gamma_tangent) check_tensor(operation, "gamma_tangent", gamma_tangent, sum.dtype, columns);
}

/// A and b are both there or both absent.
void check_both(const char* operation, const char* names, const Tensor& a, const Tensor& b) {
  check<ShapeError>(static_cast<bool>(a) == static_cast<bool>(b), operation, ": one of ", names,
                    " is empty, expected both or neither");
}

}  // namespace

void check_cast(const Tensor& source, const Tensor& destination) {
  check_floating("cast", "source", source);
  check_floating("cast", "destination", destination);
  check<ShapeError>(source.numel() == destination.numel(), "cast: source has ", source.numel(),
                    " elements, destination ", destination.numel());
}

void check_linear(const char* operation, const Tensor& x, const Tensor& weight, const Tensor& bias,
                  const Tensor& y) {
  check_rank(operation, "weight", weight, 2);
  check_rank(operation, "rows of K", x, 2);
  check_floating(operation, "rows of K", x);
  const std::int64_t n = weight.shape[0], k = weight.shape[1];
  check<ShapeError>(n > 0 && k > 0, operation, ": weight has shape ", weight.shape.to_string(),
                    ", expected at least one element");
  check_tensor(operation, "weight", weight, x.dtype, weight.shape);
  check_tensor(operation, "rows of K", x, x.dtype, Shape{x.shape[0], k});
  check_tensor(operation, "rows of N", y, x.dtype, Shape{x.shape[0], n});
  if (bias) check_tensor(operation, "bias", bias, x.dtype, Shape{n});
}

void check_linear_backward_weight(const Tensor& dy, const Tensor& x, const Tensor& dweight,
                                  const Tensor& dbias) {
  constexpr const char* kName = "linear_backward_weight";
  check_rank(kName, "dweight", dweight, 2);
  check_rank(kName, "x", x, 2);
  check_floating(kName, "x", x);
  const std::int64_t rows = x.shape[0], n = dweight.shape[0], k = dweight.shape[1];
  check<ShapeError>(n > 0 && k > 0, kName, ": dweight has shape ", dweight.shape.to_string(),
                    ", expected at least one element");
  check_tensor(kName, "x", x, x.dtype, Shape{rows, k});
  check_tensor(kName, "dy", dy, x.dtype, Shape{rows, n});
  check_tensor(kName, "dweight", dweight, DType::f32, Shape{n, k});
  if (dbias) check_tensor(kName, "dbias", dbias, DType::f32, Shape{n});
}

void check_activation_backward(const Tensor& pre_activation, const Tensor& dy, const Tensor& dpre,
                               const Tensor& y) {
  constexpr const char* kName = "activation_backward";
  const DType dtype = pre_activation.dtype;
  check_floating(kName, "pre_activation", pre_activation);
  check_tensor(kName, "dy", dy, dtype, pre_activation.shape);
  check_tensor(kName, "dpre", dpre, dtype, pre_activation.shape);
  if (y) check_tensor(kName, "y", y, dtype, pre_activation.shape);
}

void check_activation_backward_tangent(const Tensor& pre_activation,
                                       const Tensor& pre_activation_tangent, const Tensor& dy,
                                       const Tensor& dy_tangent, const Tensor& dpre_tangent) {
  constexpr const char* kName = "activation_backward_tangent";
  const DType dtype = pre_activation.dtype;
  const Shape& shape = pre_activation.shape;
  check_floating(kName, "pre_activation", pre_activation);
  check_tensor(kName, "pre_activation_tangent", pre_activation_tangent, dtype, shape);
  check_tensor(kName, "dy", dy, dtype, shape);
  check_tensor(kName, "dy_tangent", dy_tangent, dtype, shape);
  check_tensor(kName, "dpre_tangent", dpre_tangent, dtype, shape);
}

void check_dropout(const Dropout& dropout, const Tensor& row_keys, const Tensor& x,
                   const Tensor& y) {
  check_rank("dropout", "x", x, 2);
  check_floating("dropout", "x", x);
  check_tensor("dropout", "y", y, x.dtype, x.shape);
  check_row_keys("dropout", row_keys, x.shape[0], dropout, dropout);
}

void check_attention(const char* operation, const AttentionShape& shape, const Tensor& qkv,
                     const Tensor& sequence_starts, const Tensor& sample_keys,
                     const Dropout& dropout, const Tensor& out, const Tensor& log_sum_exp) {
  check<ShapeError>(shape.num_attention_heads > 0 && shape.head_size > 0, operation,
                    ": num_attention_heads ", shape.num_attention_heads, " and head_size ",
                    shape.head_size, ", expected positive numbers");
  check_floating(operation, "qkv", qkv);
  check_rank(operation, "qkv", qkv, 2);
  check_rank(operation, "sequence_starts", sequence_starts, 1);
  check<ShapeError>(sequence_starts.numel() > 0, operation,
                    ": sequence_starts is empty, expected [B+1]");
  const std::int64_t tokens = qkv.shape[0], hidden = shape.num_attention_heads * shape.head_size;
  check_tensor(operation, "qkv", qkv, qkv.dtype, {tokens, 3 * hidden});
  check_tensor(operation, "out", out, qkv.dtype, {tokens, hidden});
  check_tensor(operation, "log_sum_exp", log_sum_exp, DType::f32,
               {tokens, shape.num_attention_heads});
  check_dtype(operation, "sequence_starts", sequence_starts, DType::s32);
  if (shape.key_lengths)
    check_tensor(operation, "key_lengths", shape.key_lengths, DType::s32,
                 {sequence_starts.numel() - 1});
  if (dropout.enabled())
    check_tensor(operation, "sample_keys", sample_keys, DType::s32, {sequence_starts.numel() - 1});
}

void check_attention_tangents(const char* operation, const AttentionShape& shape,
                              const AttentionTangents& tangents, const Tensor& sequence_starts) {
  const AttentionTangents& t = tangents;
  check_attention(operation, shape, t.qkv, sequence_starts, {}, {}, t.out, t.log_sum_exp);
  check_tensor(operation, "qkv_tangent", t.qkv_tangent, t.qkv.dtype, t.qkv.shape);
  check_tensor(operation, "out_tangent", t.out_tangent, t.qkv.dtype, t.out.shape);
  check_tensor(operation, "log_sum_exp_tangent", t.log_sum_exp_tangent, DType::f32,
               t.log_sum_exp.shape);
}

void check_attention_backward_tangent(const AttentionTangents& tangents, const Tensor& dout,
                                      const Tensor& dout_tangent, const Tensor& dqkv_tangent) {
  constexpr const char* kName = "attention_backward_tangent";
  const Tensor &qkv = tangents.qkv, &out = tangents.out;
  check_tensor(kName, "dout", dout, qkv.dtype, out.shape);
  check_tensor(kName, "dout_tangent", dout_tangent, qkv.dtype, out.shape);
  check_tensor(kName, "dqkv_tangent", dqkv_tangent, qkv.dtype, qkv.shape);
}

void check_layer_norm(const LayerNormForward& args) {
  constexpr const char* kName = "layer_norm_forward";
  check_rank(kName, "x", args.x, 2);
  check_floating(kName, "x", args.x);
  const DType dtype = args.x.dtype;
  const Shape& shape = args.x.shape;
  const std::int64_t rows = shape[0], hidden_size = shape[1];
  if (args.residual) check_tensor(kName, "residual", args.residual, dtype, shape);
  check_tensor(kName, "gamma", args.gamma, dtype, Shape{hidden_size});
  check_tensor(kName, "beta", args.beta, dtype, Shape{hidden_size});
  check_tensor(kName, "sum", args.sum, dtype, shape);
  check_tensor(kName, "mean_rstd", args.mean_rstd, DType::f32, Shape{rows, 2});
  check_tensor(kName, "y", args.y, dtype, shape);
  check_row_keys(kName, args.row_keys, rows, args.input_dropout, args.output_dropout);
}

void check_layer_norm(const LayerNormBackward& args) {
  constexpr const char* kName = "layer_norm_backward";
  check_rank(kName, "dy", args.dy, 2);
  check_floating(kName, "dy", args.dy);
  const DType dtype = args.dy.dtype;
  const Shape& shape = args.dy.shape;
  const std::int64_t rows = shape[0], hidden_size = shape[1];
  check_tensor(kName, "sum", args.sum, dtype, shape);
  check_tensor(kName, "mean_rstd", args.mean_rstd, DType::f32, Shape{rows, 2});
  check_tensor(kName, "gamma", args.gamma, dtype, Shape{hidden_size});
  check_tensor(kName, "dresidual", args.dresidual, dtype, shape);
  if (args.dx || args.input_dropout.enabled()) check_tensor(kName, "dx", args.dx, dtype, shape);
  check_tensor(kName, "dgamma", args.dgamma, DType::f32, Shape{hidden_size});
  check_tensor(kName, "dbeta", args.dbeta, DType::f32, Shape{hidden_size});
  check_row_keys(kName, args.row_keys, rows, args.input_dropout, args.output_dropout);
}

void check_layer_norm(const LayerNormForwardTangent& args) {
  constexpr const char* kName = "layer_norm_forward_tangent";
  check_norm_tangent(kName, args.sum, args.mean_rstd, args.gamma, args.sum_tangent,
                     args.gamma_tangent);
  check_both(kName, "gamma_tangent and beta_tangent", args.gamma_tangent, args.beta_tangent);
  if (args.beta_tangent)
    check_tensor(kName, "beta_tangent", args.beta_tangent, args.sum.dtype, args.gamma.shape);
  check_tensor(kName, "y_tangent", args.y_tangent, args.sum.dtype, args.sum.shape);
}

void check_layer_norm(const LayerNormBackwardTangent& args) {
  constexpr const char* kName = "layer_norm_backward_tangent";
  check_norm_tangent(kName, args.sum, args.mean_rstd, args.gamma, args.sum_tangent,
                     args.gamma_tangent);
  const DType dtype = args.sum.dtype;
  check_tensor(kName, "dy", args.dy, dtype, args.sum.shape);
  check_tensor(kName, "dy_tangent", args.dy_tangent, dtype, args.sum.shape);
  check_tensor(kName, "dsum_tangent", args.dsum_tangent, dtype, args.sum.shape);
  check_both(kName, "dgamma_tangent and dbeta_tangent", args.dgamma_tangent, args.dbeta_tangent);
  if (!args.dgamma_tangent) return;
  check_tensor(kName, "dgamma_tangent", args.dgamma_tangent, DType::f32, args.gamma.shape);
  check_tensor(kName, "dbeta_tangent", args.dbeta_tangent, DType::f32, args.gamma.shape);
}

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

void check_rows(const char* operation, const Tensor& few, const Tensor& row_index,
                const Tensor& many) {
  check_rank(operation, "selected rows", few, 2);
  check_floating(operation, "selected rows", few);
  check_rank(operation, "all rows", many, 2);
  check_tensor(operation, "all rows", many, few.dtype, Shape{many.shape[0], few.shape[1]});
  check_tensor(operation, "row_index", row_index, DType::s32, Shape{few.shape[0]});
}

void check_cross_entropy(const char* operation, const Tensor& logits, const Tensor& labels) {
  check_logits(operation, logits);
  check_tensor(operation, "labels", labels, DType::s32, Shape{logits.shape[0]});
}

void check_cross_entropy_tangent(const Tensor& logits, const Tensor& logits_tangent,
                                 const Tensor& dlogits_tangent) {
  constexpr const char* kName = "cross_entropy_backward_tangent";
  check_logits(kName, logits);
  check_tensor(kName, "logits_tangent", logits_tangent, logits.dtype, logits.shape);
  check_tensor(kName, "dlogits_tangent", dlogits_tangent, logits.dtype, logits.shape);
}

void check_squared_error(const char* operation, const Tensor& predictions, const Tensor& labels) {
  check_rank(operation, "predictions", predictions, 2);
  check_floating(operation, "predictions", predictions);
  check<ShapeError>(predictions.shape[1] == 1 && predictions.numel() > 0, operation,
                    ": predictions have shape ", predictions.shape.to_string(),
                    ", expected [rows, 1] with at least one row");
  check_tensor(operation, "labels", labels, DType::f32, Shape{predictions.shape[0]});
}

void check_span(const char* operation, const Tensor& logits, const Tensor& sequence_starts,
                const Tensor& span_positions) {
  check_span_logits(operation, logits, sequence_starts);
  check_tensor(operation, "span_positions", span_positions, DType::s32,
               Shape{sequence_starts.numel() - 1, 2});
}

void check_span_tangent(const Tensor& logits, const Tensor& logits_tangent,
                        const Tensor& sequence_starts, const Tensor& dlogits_tangent) {
  constexpr const char* kName = "span_cross_entropy_backward_tangent";
  check_span_logits(kName, logits, sequence_starts);
  check_tensor(kName, "logits_tangent", logits_tangent, logits.dtype, logits.shape);
  check_tensor(kName, "dlogits_tangent", dlogits_tangent, logits.dtype, logits.shape);
}

void check_decide_update(const Tensor& loss, const Tensor& decision) {
  constexpr const char* kName = "decide_update";
  check_vector(kName, "loss", loss, 1);
  check_tensor(kName, "decision", decision, DType::s8, Shape{sizeof(UpdateDecision)});
}

void check_adam(std::span<const AdamRange> ranges, const AdamTensors& tensors,
                std::span<const FakeQuantizeRange> published, const Tensor& working) {
  constexpr const char* kName = "adam_update";
  check_tensor(kName, "decision", tensors.decision, DType::s8, Shape{sizeof(UpdateDecision)});
  const std::int64_t numel = tensors.master.numel();
  check_vector(kName, "master", tensors.master, numel);
  check_vector(kName, "gradient", tensors.gradient, numel);
  check_vector(kName, "exp_avg", tensors.exp_avg, numel);
  check_vector(kName, "exp_avg_sq", tensors.exp_avg_sq, numel);
  for (const AdamRange& range : ranges) check_range(kName, range, numel);
  if (published.empty()) return;
  check_fake_quantize(published, tensors.master, working);
  const auto same = [](const AdamRange& updated, const FakeQuantizeRange& range) {
    return updated.begin == range.begin && updated.numel == range.numel;
  };
  check<ShapeError>(
      std::equal(ranges.begin(), ranges.end(), published.begin(), published.end(), same), kName,
      ": the ", published.size(), " published ranges are not the ", ranges.size(), " updated ones");
}

void check_fake_quantize(std::span<const FakeQuantizeRange> ranges, const Tensor& master,
                         const Tensor& working) {
  constexpr const char* kName = "fake_quantize";
  const std::int64_t numel = master.numel();
  check_vector(kName, "master", master, numel);
  check_floating(kName, "working", working);
  check<ShapeError>(working.numel() == numel, kName, ": working has ", working.numel(),
                    " elements, master ", numel);
  for (const FakeQuantizeRange& range : ranges) {
    check_range(kName, range, numel);
    check_quant_spec(range.spec, range.numel);
  }
}

}  // namespace bitfall
