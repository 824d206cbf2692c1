// Do the arguments of an operation fit its contract in core/backend.h? The same for every backend.
//
// Each throws ShapeError or UnsupportedError that names the operation, the tensor, what was seen
// and what was expected. Only shapes and dtypes are looked at, never the content of a tensor.
#pragma once

#include "core/backend.h"

namespace bitfall {

void check_cast(const Tensor& source, const Tensor& destination);
/// x [R, K], weight [N, K], bias [N] or empty, and y [R, N], all of one dtype.
void check_linear(const char* operation, const Tensor& x, const Tensor& weight, const Tensor& bias,
                  const Tensor& y);
void check_linear_backward_weight(const Tensor& dy, const Tensor& x, const Tensor& dweight,
                                  const Tensor& dbias);
void check_activation_backward(const Tensor& pre_activation, const Tensor& dy, const Tensor& dpre,
                               const Tensor& y);
void check_activation_backward_tangent(const Tensor& pre_activation,
                                       const Tensor& pre_activation_tangent, const Tensor& dy,
                                       const Tensor& dy_tangent, const Tensor& dpre_tangent);
void check_dropout(const Dropout& dropout, const Tensor& row_keys, const Tensor& x,
                   const Tensor& y);
void check_attention(const char* operation, const AttentionShape& shape, const Tensor& qkv,
                     const Tensor& sequence_starts, const Tensor& sample_keys,
                     const Dropout& dropout, const Tensor& out, const Tensor& log_sum_exp);
void check_attention_tangents(const char* operation, const AttentionShape& shape,
                              const AttentionTangents& tangents, const Tensor& sequence_starts);
/// The tensors of a backward pass beside those of `tangents`.
void check_attention_backward_tangent(const AttentionTangents& tangents, const Tensor& dout,
                                      const Tensor& dout_tangent, const Tensor& dqkv_tangent);
void check_layer_norm(const LayerNormForward& args);
void check_layer_norm(const LayerNormBackward& args);
void check_layer_norm(const LayerNormForwardTangent& args);
void check_layer_norm(const LayerNormBackwardTangent& args);
/// Ids [T] and tables of `table_dtype` against the token rows [T, H].
void check_embedding(const char* operation, const EmbeddingIds& ids, const EmbeddingTables& tables,
                     const Tensor& rows, DType table_dtype);
/// `few` [R, H] are rows of `many` [T, H] chosen by row_index [R].
void check_rows(const char* operation, const Tensor& few, const Tensor& row_index,
                const Tensor& many);
void check_cross_entropy(const char* operation, const Tensor& logits, const Tensor& labels);
void check_cross_entropy_tangent(const Tensor& logits, const Tensor& logits_tangent,
                                 const Tensor& dlogits_tangent);
void check_squared_error(const char* operation, const Tensor& predictions, const Tensor& labels);
void check_span(const char* operation, const Tensor& logits, const Tensor& sequence_starts,
                const Tensor& span_positions);
void check_span_tangent(const Tensor& logits, const Tensor& logits_tangent,
                        const Tensor& sequence_starts, const Tensor& dlogits_tangent);
void check_decide_update(const Tensor& loss, const Tensor& decision);
void check_adam(std::span<const AdamRange> ranges, const AdamTensors& tensors,
                std::span<const FakeQuantizeRange> published, const Tensor& working);
void check_fake_quantize(std::span<const FakeQuantizeRange> ranges, const Tensor& master,
                         const Tensor& working);

}  // namespace bitfall
