// EncoderPass: what all parts of the encoder share during one forward and backward pass.
//
// Shape letters beside those of core/backend.h: R rows after the last attention, T or B.
#pragma once

#include "core/backend.h"
#include "core/model.h"
#include "engine/encoder_batch.h"

namespace bitfall {

/// Which rows of the encoder's output the head reads.
enum class OutputRows { first_token, all_tokens };

/// Which gradients a backward pass computes.
enum class Differentiate { weights_and_input, input_only };

/// Memory that every layer uses in turn. Compute dtype unless noted; parts of it are viewed under
/// smaller shapes.
struct EncoderScratch {
  Tensor wide;             ///< [T, max(F, 3H)]
  Tensor hidden;           ///< [T, H]
  Tensor d_hidden;         ///< [T, H] gradient that travels down the layers; forward: an input
  Tensor d_dense;          ///< [T, H]; forward: the input of every other layer
  Tensor rows;             ///< [B, H], with OutputRows::first_token
  Tensor d_gamma, d_beta;  ///< [H] f32, for norms whose weight gradients are not wanted
  Tensor wide_tangent;     ///< [T, max(F, 3H)], Hessian products alone
};

struct EncoderPass {
  Backend& backend;
  const EncoderBatch& batch;
  const EncoderScratch& scratch;
  ForwardContext context;

  /// Dropout number `site` of the network; off except in Mode::train.
  Dropout dropout(float probability, int site) const {
    return {context.mode == Mode::train ? probability : 0.0f, context.seed,
            static_cast<std::uint32_t>(site)};
  }
  const Tensor& row_keys(OutputRows rows) const {
    return rows == OutputRows::all_tokens ? batch.row_keys : batch.first_token_keys;
  }
};

/// The beginning of `memory` under another, smaller shape.
inline Tensor first_part(const Tensor& memory, const Shape& shape) {
  return memory.flat_slice(0, shape.numel()).reshaped(shape);
}

}  // namespace bitfall
