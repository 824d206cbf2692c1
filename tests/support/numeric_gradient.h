// Derivatives of a double-precision reference, to check an operation's backward pass with.
#pragma once

#include <functional>
#include <vector>

namespace bitfall::test {

/// d function / d x by central differences. In double precision with values near 1 the error is
/// about step^2.
inline std::vector<double> numeric_gradient(
    const std::function<double(const std::vector<double>&)>& function, std::vector<double> x,
    double step = 1e-5) {
  std::vector<double> gradient(x.size());
  for (std::size_t i = 0; i < x.size(); ++i) {
    const double value = x[i];
    x[i] = value + step;
    const double above = function(x);
    x[i] = value - step;
    const double below = function(x);
    x[i] = value;
    gradient[i] = (above - below) / (2 * step);
  }
  return gradient;
}

/// d function(x + t direction) / dt at t = 0, the same way, for a vector-valued function.
inline std::vector<double> numeric_tangent(
    const std::function<std::vector<double>(const std::vector<double>&)>& function,
    const std::vector<double>& x, const std::vector<double>& direction, double step = 1e-5) {
  const auto at = [&](double t) {
    std::vector<double> moved = x;
    for (std::size_t i = 0; i < moved.size(); ++i) moved[i] += t * direction[i];
    return function(moved);
  };
  std::vector<double> tangent = at(step);
  const std::vector<double> below = at(-step);
  for (std::size_t i = 0; i < tangent.size(); ++i)
    tangent[i] = (tangent[i] - below[i]) / (2 * step);
  return tangent;
}

/// sum_i a[i] * b[i]: turns a vector-valued reference into the scalar whose gradient is the
/// backward pass of `a` with the output gradient `b`.
inline double weighted_sum(const std::vector<double>& a, const std::vector<double>& b) {
  double sum = 0;
  for (std::size_t i = 0; i < a.size(); ++i) sum += a[i] * b[i];
  return sum;
}

}  // namespace bitfall::test
