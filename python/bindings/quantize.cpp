// Quantization of one array with the arithmetic of training.
#include "engine/factory.h"
#include "python/bindings/arrays.h"
#include "python/bindings/bindings.h"
#include "quantizer/integer_weights.h"

namespace py = pybind11;

namespace bitfall::python {
namespace {

QuantSpec make_spec(int bits, std::int64_t groups, const std::string& q_type,
                    const std::string& rounding) {
  check<ConfigError>(q_type == "symmetric" || q_type == "asymmetric", "q_type = '", q_type,
                     "': expected 'symmetric' or 'asymmetric'");
  check<ConfigError>(rounding == "nearest" || rounding == "stochastic", "rounding = '", rounding,
                     "': expected 'nearest' or 'stochastic'");
  return {.bits = bits,
          .groups = groups,
          .q_type = q_type == "symmetric" ? QuantType::symmetric : QuantType::asymmetric,
          .rounding = rounding == "nearest" ? Rounding::nearest : Rounding::stochastic};
}

/// View of the array's own memory; operations only read it.
Tensor flat_tensor(const py::array& array) {
  const std::span<const float> values = elements<float>("array", array);
  check<ShapeError>(!values.empty(), "array is empty: expected at least one element");
  return {const_cast<float*>(values.data()), DType::f32,
          Shape{static_cast<std::int64_t>(values.size())}, Device::cpu};
}

py::array_t<float> fake_quantize_array(const py::array& array, int bits, std::int64_t groups,
                                       const std::string& q_type, const std::string& rounding,
                                       std::uint64_t seed) {
  const Tensor master = flat_tensor(array);
  py::array_t<float> result(std::vector<py::ssize_t>(array.shape(), array.shape() + array.ndim()));
  const Tensor working{result.mutable_data(), DType::f32, master.shape, Device::cpu};
  const FakeQuantizeRange all{
      0, master.numel(), make_spec(bits, groups, q_type, rounding), {.seed = seed}};
  const py::gil_scoped_release release;
  make_backend("cpu")->fake_quantize({&all, 1}, master, working);
  return result;
}

py::tuple quantize_array(const py::array& array, int bits, std::int64_t groups,
                         const std::string& q_type, const std::string& rounding,
                         std::uint64_t seed) {
  const IntegerWeights weights = quantize_to_integers(make_spec(bits, groups, q_type, rounding),
                                                      {.seed = seed}, flat_tensor(array));
  py::array codes = array_of<std::int32_t>(weights.codes);
  const std::vector<py::ssize_t> shape(array.shape(), array.shape() + array.ndim());
  return py::make_tuple(codes.reshape(shape), array_of<float>(weights.scales),
                        array_of<std::int32_t>(weights.zero_points));
}

}  // namespace

void bind_quantize(py::module_& module) {
  const auto define = [&module](const char* name, auto function) {
    module.def(name, function, py::arg("array"), py::arg("bits"), py::arg("groups") = 1,
               py::arg("q_type") = "symmetric", py::arg("rounding") = "nearest",
               py::arg("seed") = 0);
  };
  define("fake_quantize", &fake_quantize_array);
  define("quantize", &quantize_array);
}

}  // namespace bitfall::python
