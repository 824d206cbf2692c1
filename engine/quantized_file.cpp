#include "engine/quantized_file.h"

#include <map>
#include <span>
#include <string>
#include <system_error>
#include <vector>

#include "core/error.h"
#include "engine/safetensors.h"
#include "quantizer/integer_weights.h"
#include "quantizer/quant_math.h"

namespace bitfall {
namespace {

/// Tensors of one file with their bytes, in order.
struct FileContent {
  std::vector<SafetensorsInfo> tensors;
  std::vector<std::vector<std::byte>> data;
  std::map<std::string, std::string> metadata{{"format", "pt"}};

  template <typename T>
  void add(const std::string& name, const char* dtype, std::vector<std::int64_t> shape,
           std::span<const T> values) {
    const auto bytes = std::as_bytes(values);
    tensors.push_back({name, dtype, std::move(shape)});
    data.emplace_back(bytes.begin(), bytes.end());
  }
};

std::vector<std::int64_t> dims(const Shape& shape) {
  std::vector<std::int64_t> result;
  for (std::size_t axis = 0; axis < shape.rank(); ++axis) result.push_back(shape[axis]);
  return result;
}

const char* code_dtype(int code_bits, QuantType q_type) {
  const bool is_signed = q_type == QuantType::symmetric;
  if (code_bits == 16) return is_signed ? "I16" : "U16";
  return code_bits == 8 && is_signed ? "I8" : "U8";
}

void add_quantized(const Parameter& parameter, const IntegerWeights& weights,
                   FileContent& content) {
  const QuantSpec& spec = weights.spec;
  const PackedCodes packed = pack_codes(weights);
  const bool is_stream = packed.code_bits != 8 && packed.code_bits != 16;
  const auto groups = static_cast<std::int64_t>(weights.scales.size());
  content.add<std::uint8_t>(parameter.name + ".codes", code_dtype(packed.code_bits, spec.q_type),
                            is_stream ? std::vector{static_cast<std::int64_t>(packed.bytes.size())}
                                      : dims(parameter.shape),
                            packed.bytes);
  content.add<float>(parameter.name + ".scales", "F32", {groups}, weights.scales);
  if (spec.q_type == QuantType::asymmetric) {
    content.add<std::int32_t>(parameter.name + ".zero_points", "I32", {groups},
                              weights.zero_points);
  }
  content.metadata[parameter.name] =
      concat("bits=", spec.bits, " code_bits=", packed.code_bits, " groups=", groups,
             " shape=", parameter.shape.to_string());
}

FileContent make_content(Backend& backend, const std::vector<Parameter>& parameters,
                         std::span<const Tensor> masters, const Quantizer& quantizer,
                         std::int64_t step) {
  FileContent content;
  for (std::size_t index = 0; index < parameters.size(); ++index) {
    const Parameter& parameter = parameters[index];
    std::vector<float> values(static_cast<std::size_t>(parameter.numel));
    const Tensor host{values.data(), DType::f32, parameter.shape, Device::cpu};
    backend.copy(masters[index], host);
    const QuantSpec spec = quantizer.spec(index);
    if (spec.bits >= kCastBits) {
      content.add<float>(parameter.name, "F32", dims(parameter.shape), values);
    } else {
      add_quantized(parameter, quantize_to_integers(spec, quantizer.key(index, step), host),
                    content);
    }
  }
  return content;
}

}  // namespace

void save_quantized_file(const std::filesystem::path& folder, Backend& backend,
                         const std::vector<Parameter>& parameters, std::span<const Tensor> masters,
                         const Quantizer& quantizer, std::int64_t step) {
  const FileContent content = make_content(backend, parameters, masters, quantizer, step);
  std::error_code error;
  std::filesystem::create_directories(folder, error);
  check<ModelFileError>(!error, folder.string(), ": cannot create the folder (", error.message(),
                        ")");
  SafetensorsWriter writer(folder / "quantized.safetensors", content.tensors, content.metadata);
  for (const std::vector<std::byte>& data : content.data) writer.write(data);
  writer.commit();
}

}  // namespace bitfall
