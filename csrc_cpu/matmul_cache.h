// oneDNN matrix products: primitives are created once per shape and kept, weights are repacked once
// per call.
//
// Packed batches have an ever-changing number of rows. So rows are cut into pieces of at most 64:
// each piece is multiplied by one thread, a handful of primitives covers every batch, and what
// follows (an activation) finds the piece still in the second-level cache.
#pragma once

#include <compare>
#include <cstdint>
#include <functional>
#include <memory>

#include "core/backend.h"

namespace bitfall {

enum class Transpose { no, yes };

/// y [rows, n] (+)= x [rows, k] weight [k, n] (+ bias [n]); a transposed weight is stored [n, k].
struct MatmulSpec {
  std::int64_t n = 0, k = 0;
  Transpose transpose = Transpose::no;
  Accumulate accumulate = Accumulate::no;
  bool has_bias = false;
  DType dtype = DType::f32;  ///< of every operand: f32, or bf16 where is_native says so

  auto operator<=>(const MatmulSpec&) const = default;
};

struct MatmulOperands {
  std::int64_t rows = 0;
  const void* x = nullptr;
  const void* weight = nullptr;
  const void* bias = nullptr;  ///< read if MatmulSpec::has_bias
  void* y = nullptr;
};

/// dweight [n, k] f32 = dy [rows, n]^T x [rows, k].
struct WeightGradientSpec {
  std::int64_t rows = 0, n = 0, k = 0;
  DType dtype = DType::f32;  ///< of dy and x

  auto operator<=>(const WeightGradientSpec&) const = default;
};

class MatmulCache {
 public:
  MatmulCache();
  ~MatmulCache();

  /// Whether the CPU multiplies this dtype itself; other dtypes must be converted to f32.
  bool is_native(DType dtype) const;

  /// Called on any thread when rows [begin, end) of the result are complete; must not throw.
  using AfterRows = std::function<void(std::int64_t begin, std::int64_t end)>;
  /// The product on all threads; no size may be 0. Throws BackendError if oneDNN fails.
  void multiply(const MatmulSpec& spec, const MatmulOperands& operands, const AfterRows& after);
  void weight_gradient(const WeightGradientSpec& spec, const void* dy, const void* x,
                       float* dweight);

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace bitfall
