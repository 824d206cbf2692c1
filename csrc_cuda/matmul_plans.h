// cuBLASLt matrix products: one plan (description and algorithm) per shape, chosen once and kept.
#pragma once

#include <compare>
#include <cstdint>
#include <memory>

#include "core/backend.h"
#include "csrc_cuda/cuda_utils.h"

namespace bitfall {

/// Whether an operand lies in memory as it is multiplied, or transposed.
enum class Stored { as_is, transposed };

/// y [rows, columns] (+)= left [rows, depth] right [depth, columns] (+ bias [columns]), row-major.
struct MatmulSpec {
  std::int64_t rows = 0, columns = 0, depth = 0;
  Stored left = Stored::as_is, right = Stored::as_is;
  Accumulate accumulate = Accumulate::no;
  DType dtype = DType::f32;         ///< of left, right and bias
  DType result_dtype = DType::f32;  ///< of y
};

struct MatmulOperands {
  const void* left = nullptr;
  const void* right = nullptr;
  const void* bias = nullptr;  ///< or null; then result_dtype is dtype
  void* y = nullptr;
};

class MatmulPlans {
 public:
  static constexpr std::size_t kWorkspaceBytes = std::size_t{32} << 20;

  /// For the GPU that is current on this thread. Throws BackendError.
  MatmulPlans();
  ~MatmulPlans();

  /// Starts the product on `stream`; no size may be 0. Sums are f32 (not TF32) and have a fixed
  /// order. `workspace` holds kWorkspaceBytes. Throws BackendError that names the sizes.
  void multiply(const MatmulSpec& spec, const MatmulOperands& operands, void* workspace,
                cudaStream_t stream);

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace bitfall
