// Power iteration carried out in the Krylov space of the start vector: the numbers of plain power
// iteration for a fraction of its matrix products.
//
// Plain power iteration from u_0 (one product each) is
//   h_i = H u_{i-1},   lambda_i = <h_i, u_{i-1}>,   u_i = h_i / (|h_i| + stability),
// and it ends after iteration i when |(lambda_i - lambda_{i-1}) / lambda_i| < tol, when lambda_i =
// 0, or when i = max_iter. Every u_i lies in span{u_0, H u_0, ..., H^i u_0}. In the orthonormal
// basis that k products of the Lanczos process build for that space, H is the tridiagonal T_k, and
//   e_1^T T_k^m e_1 = q_1^T H^m q_1   for all m <= 2k - 1   (Golub & Meurant 1994).
// lambda_i needs moments up to 2i - 1 only. So the same iteration run on T_k from e_1 gives exactly
// lambda_1 .. lambda_k, and close approximations of later ones as soon as the extreme eigenvalues
// of T_k have settled, long before plain power iteration has. After each product the whole
// iteration is therefore replayed on T_k, and products end when the replay stops within the exact
// part, or when its outcome has settled over successive k.
//
// Each vector is orthogonalised against the two before it only. What rounding does to the others
// gives T_k close copies of eigenvalues it has found already, as if H had them; the moments, and so
// the replay, do not notice (Greenbaum 1989).
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <vector>

#include "core/backend.h"

namespace bitfall {

struct PowerIterationOptions {
  int max_iter = 100;       ///< at least 1
  double tol = 1e-2;        ///< relative change of lambda between iterations that ends the loop
  double stability = 1e-6;  ///< added to each norm before dividing by it
};

struct PowerIterationResult {
  double value = 0;        ///< lambda with its sign; NaN if a product was not finite
  int iterations = 0;      ///< of plain power iteration
  bool converged = false;  ///< ended by tol or by lambda = 0, not by max_iter
  int products = 0;        ///< matrix products taken, at most `iterations` when that is exact
};

/// Symmetric tridiagonal matrix: diagonal [k], off_diagonal [k - 1].
struct Tridiagonal {
  std::vector<double> diagonal, off_diagonal;
};

/// Plain power iteration on `matrix` from e_1 * start_norm / (start_norm + stability).
PowerIterationResult power_iteration(const Tridiagonal& matrix, double start_norm,
                                     const PowerIterationOptions& options);

/// product [n] f32 = H v [n] f32, H symmetric. Both belong to the caller.
using HessianVectorProduct = std::function<void(const Tensor& v, const Tensor& product)>;

class KrylovPowerIteration {
 public:
  KrylovPowerIteration(Backend& backend, const PowerIterationOptions& options)
      : backend_(backend), options_(options) {}

  /// Power iteration from `start` [n] f32. Keeps three vectors of n elements, whatever the number
  /// of products, and reuses them in the next run.
  PowerIterationResult run(const Tensor& start, const HessianVectorProduct& product);

 private:
  /// Memory of basis vector `index`: the last three are kept.
  Tensor basis(std::size_t index, std::int64_t n);
  /// Removes the component along `q`, of length 1, from `w`; returns its coefficient.
  double orthogonalise(const Tensor& w, const Tensor& q);

  Backend& backend_;
  PowerIterationOptions options_;
  std::array<Buffer, 3> basis_;
};

}  // namespace bitfall
