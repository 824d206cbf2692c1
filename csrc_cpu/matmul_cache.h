// oneDNN matrix products: primitives are created once per shape and kept.
#pragma once

#include <compare>
#include <cstdint>
#include <memory>

#include "core/backend.h"

namespace bitfall {

enum class Transpose { no, yes };

/// c [m, n] (+)= a [m, k] b [k, n] (+ bias [n]). A transposed operand is stored as [k, m] or [n,
/// k].
struct MatmulSpec {
  std::int64_t m = 0, n = 0, k = 0;
  Transpose a = Transpose::no, b = Transpose::no;
  DType operands = DType::f32;  ///< of a, b and bias: f32, or bf16 where the CPU multiplies it
  DType result = DType::f32;    ///< of c
  Accumulate accumulate = Accumulate::no;
  bool has_bias = false;

  auto operator<=>(const MatmulSpec&) const = default;
};

class MatmulCache {
 public:
  MatmulCache();
  ~MatmulCache();

  /// Whether the CPU multiplies this dtype itself; other dtypes must be converted to f32.
  bool is_native(DType dtype) const;
  /// Runs the product on all threads. Throws BackendError if oneDNN fails.
  void run(const MatmulSpec& spec, const void* a, const void* b, const void* bias, void* c);

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace bitfall
