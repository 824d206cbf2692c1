#include "python/bindings/batch.h"

#include <set>

#include "python/bindings/arrays.h"

namespace py = pybind11;

namespace bitfall::python {
namespace {

const std::set<std::string> kKeys{"input_ids", "token_type_ids", "sequence_starts", "sample_keys",
                                  "labels"};

py::array array_at(const py::dict& dict, const char* key) {
  const py::object value = dict[key];
  check<ShapeError>(py::isinstance<py::array>(value), "batch['", key, "'] is a ",
                    std::string(py::str(py::type::of(value).attr("__name__"))),
                    ", expected a numpy array");
  return py::reinterpret_borrow<py::array>(value);
}

std::vector<std::int32_t> integers_at(const py::dict& dict, const char* key) {
  return vector_of<std::int32_t>(concat("batch['", key, "']"), array_at(dict, key));
}

/// [B] integers are classes, [B] floats targets of regression, [B, 2] integers spans.
void read_labels(const py::array& labels, Batch& batch) {
  const std::string name = "batch['labels']";
  if (labels.ndim() == 2) {
    check<ShapeError>(labels.shape(1) == 2, name, " has ", labels.shape(1),
                      " columns, expected 2 (start and end)");
    const std::span<const std::int32_t> values = elements<std::int32_t>(name, labels);
    batch.span_positions.assign(values.begin(), values.end());
  } else if (labels.dtype().kind() == 'f') {
    batch.regression_labels = vector_of<float>(name, labels);
  } else {
    batch.class_labels = vector_of<std::int32_t>(name, labels);
  }
}

}  // namespace

Batch to_batch(const py::dict& dict) {
  for (const auto& [key, value] : dict) {
    const std::string name = py::str(key);
    check<ShapeError>(kKeys.count(name) == 1, "batch['", name,
                      "'] is unknown: expected input_ids, token_type_ids, sequence_starts, "
                      "sample_keys, labels");
  }
  for (const char* key : {"input_ids", "sequence_starts", "sample_keys"}) {
    check<ShapeError>(dict.contains(key), "batch['", key, "'] is missing");
  }
  Batch batch;
  batch.input_ids = integers_at(dict, "input_ids");
  if (dict.contains("token_type_ids")) batch.token_type_ids = integers_at(dict, "token_type_ids");
  batch.sequence_starts = integers_at(dict, "sequence_starts");
  batch.sample_keys = integers_at(dict, "sample_keys");
  if (dict.contains("labels")) read_labels(array_at(dict, "labels"), batch);
  return batch;
}

}  // namespace bitfall::python
