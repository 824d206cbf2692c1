// Hessian-vector products from gradients alone, for any model.
#pragma once

#include <functional>

#include "core/backend.h"

namespace bitfall {

/// Gradient [n] f32 at the weights as they are now; valid until the next call.
using GradientFunction = std::function<Tensor()>;

/// H v = (g(w + e v) - g(w - e v)) / 2e for one block of parameters after the other: two gradients
/// per product, and one per block for the size of g (Nocedal & Wright 2006, section 8.2).
///
/// The step e is what keeps the difference true, and no fixed one does: along a random direction a
/// block of BERT has next to no curvature and the difference drowns in the rounding of f32
/// gradients unless e is large; along leading eigenvectors the same e would leave the range in
/// which the gradient is linear. So e is chosen such that the gradient changes by a fixed share of
/// its norm: e = kGradientChange |g(w)| / |H v| within kSmallestStep .. kLargestStep of |w|. A
/// product taken with more than kTolerance times that step is taken again. The step is kept for the
/// next product and, relative to |w|, for the next block, so that about one product in all is
/// repeated.
class DifferenceHessian {
 public:
  explicit DifferenceHessian(Backend& backend) : backend_(backend) {}

  /// Starts a block. `weights` [n] f32 is the memory that `gradient` reads. It is written during a
  /// product and holds its old bits again afterwards, also when `gradient` throws.
  void begin_block(const Tensor& weights, GradientFunction gradient);

  /// product [n] f32 = H v for the current block, v [n] f32 of length 1.
  void operator()(const Tensor& v, const Tensor& product);

 private:
  /// product = (g(w + step v) - g(w - step v)) / (2 step).
  void difference(const Tensor& v, double step, const Tensor& product);
  /// product = scale * g(w + step v) + keep * product.
  void add_gradient(const Tensor& v, double step, double scale, float keep, const Tensor& product);

  Backend& backend_;
  Buffer base_weights_buffer_;
  Tensor weights_, base_weights_;
  GradientFunction gradient_;
  double weight_norm_ = 0, gradient_norm_ = 0;
  double relative_step_ = 0;   ///< of the next product
  double learned_step_ = 0;    ///< relative step after the first product; 0 before any block
  bool first_product_ = true;  ///< along the random start vector
};

}  // namespace bitfall
