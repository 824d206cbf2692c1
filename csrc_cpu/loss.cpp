#include <cmath>

#include "core/checks.h"
#include "core/operation_checks.h"
#include "csrc_cpu/cpu_backend.h"

// Logits are few (classes per sequence, or two per token): plain double precision loops on one
// thread.
namespace bitfall {
namespace {

double read(const Tensor& tensor, std::int64_t index) {
  return visit_dtype(tensor.dtype, [&](auto tag) -> double {
    return to_float(tensor.as<typename decltype(tag)::type>()[index]);
  });
}

void write(const Tensor& tensor, std::int64_t index, double value) {
  visit_dtype(tensor.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    tensor.as<T>()[index] = from_float<T>(static_cast<float>(value));
  });
}

/// One softmax: `count` logits at first, first + stride, ...; the target counts in strides.
struct SoftmaxTerm {
  std::int64_t first, stride, count, target;
};

double log_denominator(const Tensor& logits, const SoftmaxTerm& term) {
  double largest = -INFINITY;
  for (std::int64_t i = 0; i < term.count; ++i)
    largest = std::fmax(largest, read(logits, term.first + i * term.stride));
  double sum = 0;
  for (std::int64_t i = 0; i < term.count; ++i)
    sum += std::exp(read(logits, term.first + i * term.stride) - largest);
  return largest + std::log(sum);
}

double cross_entropy(const Tensor& logits, const SoftmaxTerm& term) {
  return log_denominator(logits, term) - read(logits, term.first + term.target * term.stride);
}

void cross_entropy_gradient(const Tensor& logits, const SoftmaxTerm& term, double scale,
                            const Tensor& dlogits) {
  const double denominator = log_denominator(logits, term);
  for (std::int64_t i = 0; i < term.count; ++i) {
    const std::int64_t index = term.first + i * term.stride;
    const double probability = std::exp(read(logits, index) - denominator);
    write(dlogits, index, scale * (probability - (i == term.target ? 1.0 : 0.0)));
  }
}

/// scale * (diag(p) - p p^T) logits_tangent, p the softmax.
void cross_entropy_gradient_tangent(const Tensor& logits, const Tensor& logits_tangent,
                                    const SoftmaxTerm& term, double scale,
                                    const Tensor& dlogits_tangent) {
  const double denominator = log_denominator(logits, term);
  const auto probability = [&](std::int64_t index) {
    return std::exp(read(logits, index) - denominator);
  };
  double mean = 0;
  for (std::int64_t i = 0; i < term.count; ++i) {
    const std::int64_t index = term.first + i * term.stride;
    mean += probability(index) * read(logits_tangent, index);
  }
  for (std::int64_t i = 0; i < term.count; ++i) {
    const std::int64_t index = term.first + i * term.stride;
    write(dlogits_tangent, index,
          scale * probability(index) * (read(logits_tangent, index) - mean));
  }
}

SoftmaxTerm class_term(const Tensor& logits, const Tensor& labels, std::int64_t row) {
  const std::int64_t classes = logits.shape[1];
  return {row * classes, 1, classes, labels.as<std::int32_t>()[row]};
}

/// `end` selects start (0) or end (1) position of the span.
SoftmaxTerm span_term(const Tensor& starts, std::int64_t sequence, std::int64_t end,
                      std::int64_t target) {
  const auto* start = starts.as<std::int32_t>() + sequence;
  return {2 * start[0] + end, 2, start[1] - start[0], target};
}

SoftmaxTerm span_term(const Tensor& starts, const Tensor& positions, std::int64_t sequence,
                      std::int64_t end) {
  return span_term(starts, sequence, end, positions.as<std::int32_t>()[2 * sequence + end]);
}

void check_target(const char* operation, const char* what, const SoftmaxTerm& term,
                  std::int64_t row) {
  check<ShapeError>(term.target >= 0 && term.target < term.count, operation, ": ", what, " ", row,
                    " = ", term.target, " is outside of 0..", term.count - 1);
}

void check_labels(const char* operation, const Tensor& logits, const Tensor& labels) {
  check_cross_entropy(operation, logits, labels);
  for (std::int64_t row = 0; row < logits.shape[0]; ++row)
    check_target(operation, "label", class_term(logits, labels, row), row);
}

void check_starts(const char* operation, const Tensor& logits, const Tensor& starts) {
  const std::int64_t sequences = starts.numel() - 1;
  const auto* start = starts.as<std::int32_t>();
  check<ShapeError>(start[0] == 0 && start[sequences] == logits.shape[0], operation,
                    ": sequence_starts run from ", start[0], " to ", start[sequences],
                    ", expected 0 to ", logits.shape[0]);
  for (std::int64_t sequence = 0; sequence < sequences; ++sequence) {
    check<ShapeError>(start[sequence] < start[sequence + 1], operation, ": sequence ", sequence,
                      " is empty");
  }
}

void check_positions(const char* operation, const Tensor& logits, const Tensor& starts,
                     const Tensor& positions) {
  check_span(operation, logits, starts, positions);
  check_starts(operation, logits, starts);
  for (std::int64_t sequence = 0; sequence + 1 < starts.numel(); ++sequence) {
    for (std::int64_t end = 0; end < 2; ++end)
      check_target(operation, "span position of sequence",
                   span_term(starts, positions, sequence, end), sequence);
  }
}

}  // namespace

void CpuBackend::cross_entropy_forward(const Tensor& logits, const Tensor& labels,
                                       const Tensor& loss) {
  check_labels("cross_entropy_forward", logits, labels);
  check_tensor("cross_entropy_forward", "loss", loss, DType::f32, Shape{1});
  const std::int64_t rows = logits.shape[0];
  double sum = 0;
  for (std::int64_t row = 0; row < rows; ++row)
    sum += cross_entropy(logits, class_term(logits, labels, row));
  write(loss, 0, sum / static_cast<double>(rows));
}

void CpuBackend::cross_entropy_backward(const Tensor& logits, const Tensor& labels, float scale,
                                        const Tensor& dlogits) {
  check_labels("cross_entropy_backward", logits, labels);
  check_tensor("cross_entropy_backward", "dlogits", dlogits, logits.dtype, logits.shape);
  const std::int64_t rows = logits.shape[0];
  for (std::int64_t row = 0; row < rows; ++row) {
    cross_entropy_gradient(logits, class_term(logits, labels, row),
                           scale / static_cast<double>(rows), dlogits);
  }
}

void CpuBackend::cross_entropy_backward_tangent(const Tensor& logits, const Tensor& logits_tangent,
                                                float scale, const Tensor& dlogits_tangent) {
  check_cross_entropy_tangent(logits, logits_tangent, dlogits_tangent);
  const std::int64_t rows = logits.shape[0], classes = logits.shape[1];
  for (std::int64_t row = 0; row < rows; ++row) {
    cross_entropy_gradient_tangent(logits, logits_tangent, {row * classes, 1, classes, 0},
                                   scale / static_cast<double>(rows), dlogits_tangent);
  }
}

void CpuBackend::mean_squared_error_forward(const Tensor& predictions, const Tensor& labels,
                                            const Tensor& loss) {
  check_squared_error("mean_squared_error_forward", predictions, labels);
  check_tensor("mean_squared_error_forward", "loss", loss, DType::f32, Shape{1});
  const std::int64_t rows = predictions.shape[0];
  double sum = 0;
  for (std::int64_t row = 0; row < rows; ++row) {
    const double difference = read(predictions, row) - labels.as<float>()[row];
    sum += difference * difference;
  }
  write(loss, 0, sum / static_cast<double>(rows));
}

void CpuBackend::mean_squared_error_backward(const Tensor& predictions, const Tensor& labels,
                                             float scale, const Tensor& dpredictions) {
  constexpr const char* kName = "mean_squared_error_backward";
  check_squared_error(kName, predictions, labels);
  check_tensor(kName, "dpredictions", dpredictions, predictions.dtype, predictions.shape);
  const std::int64_t rows = predictions.shape[0];
  for (std::int64_t row = 0; row < rows; ++row) {
    const double difference = read(predictions, row) - labels.as<float>()[row];
    write(dpredictions, row, 2.0 * scale * difference / static_cast<double>(rows));
  }
}

void CpuBackend::span_cross_entropy_forward(const Tensor& logits, const Tensor& sequence_starts,
                                            const Tensor& span_positions, const Tensor& loss) {
  check_positions("span_cross_entropy_forward", logits, sequence_starts, span_positions);
  check_tensor("span_cross_entropy_forward", "loss", loss, DType::f32, Shape{1});
  const std::int64_t sequences = sequence_starts.numel() - 1;
  double sum = 0;
  for (std::int64_t sequence = 0; sequence < sequences; ++sequence) {
    for (std::int64_t end = 0; end < 2; ++end)
      sum += cross_entropy(logits, span_term(sequence_starts, span_positions, sequence, end));
  }
  write(loss, 0, sum / static_cast<double>(2 * sequences));
}

void CpuBackend::span_cross_entropy_backward(const Tensor& logits, const Tensor& sequence_starts,
                                             const Tensor& span_positions, float scale,
                                             const Tensor& dlogits) {
  check_positions("span_cross_entropy_backward", logits, sequence_starts, span_positions);
  check_tensor("span_cross_entropy_backward", "dlogits", dlogits, logits.dtype, logits.shape);
  const std::int64_t sequences = sequence_starts.numel() - 1;
  for (std::int64_t sequence = 0; sequence < sequences; ++sequence) {
    for (std::int64_t end = 0; end < 2; ++end) {
      cross_entropy_gradient(logits, span_term(sequence_starts, span_positions, sequence, end),
                             scale / static_cast<double>(2 * sequences), dlogits);
    }
  }
}

void CpuBackend::span_cross_entropy_backward_tangent(const Tensor& logits,
                                                     const Tensor& logits_tangent,
                                                     const Tensor& sequence_starts, float scale,
                                                     const Tensor& dlogits_tangent) {
  check_span_tangent(logits, logits_tangent, sequence_starts, dlogits_tangent);
  check_starts("span_cross_entropy_backward_tangent", logits, sequence_starts);
  const std::int64_t sequences = sequence_starts.numel() - 1;
  for (std::int64_t sequence = 0; sequence < sequences; ++sequence) {
    for (std::int64_t end = 0; end < 2; ++end) {
      cross_entropy_gradient_tangent(logits, logits_tangent,
                                     span_term(sequence_starts, sequence, end, 0),
                                     scale / static_cast<double>(2 * sequences), dlogits_tangent);
    }
  }
}

}  // namespace bitfall
