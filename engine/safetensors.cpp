#include "engine/safetensors.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <limits>
#include <nlohmann/json.hpp>
#include <tuple>
#include <unordered_set>

#include "core/error.h"

namespace bitfall {
namespace {

using nlohmann::json;

constexpr std::uint64_t kLengthBytes = 8;
constexpr std::uint64_t kMaxHeaderBytes = 100'000'000;  // the limit of the reference reader
constexpr std::string_view kMetadataKey = "__metadata__";

struct FileDType {
  std::string_view name;
  std::uint64_t bytes;
};
constexpr std::array<FileDType, 16> kFileDTypes{{{"F64", 8},
                                                 {"F32", 4},
                                                 {"F16", 2},
                                                 {"BF16", 2},
                                                 {"F8_E5M2", 1},
                                                 {"F8_E4M3", 1},
                                                 {"I64", 8},
                                                 {"I32", 4},
                                                 {"I16", 2},
                                                 {"I8", 1},
                                                 {"U64", 8},
                                                 {"U32", 4},
                                                 {"U16", 2},
                                                 {"U8", 1},
                                                 {"BOOL", 1},
                                                 {"C64", 8}}};

/// 0 for an unknown dtype.
std::uint64_t element_bytes(std::string_view dtype) {
  for (const FileDType& known : kFileDTypes) {
    if (known.name == dtype) return known.bytes;
  }
  return 0;
}

/// Bytes of the data of one tensor. Throws ModelFileError for an unknown dtype and on overflow.
std::uint64_t data_bytes(const SafetensorsInfo& info, const std::string& source) {
  std::uint64_t bytes = element_bytes(info.dtype);
  check<ModelFileError>(bytes != 0, source, ": tensor '", info.name, "' has unknown dtype '",
                        info.dtype, "'");
  for (const std::int64_t dim : info.shape) {
    check<ModelFileError>(
        dim >= 0 && !__builtin_mul_overflow(bytes, static_cast<std::uint64_t>(dim), &bytes), source,
        ": tensor '", info.name, "' has an impossible shape ", info.shape_text());
  }
  return bytes;
}

/// Parses the header and refuses what a DOM would hide: duplicate keys and deep nesting.
json parse_header(std::string_view text, const std::string& source) {
  std::vector<std::unordered_set<std::string>> keys;
  const auto watch = [&](int depth, json::parse_event_t event, json& parsed) {
    const auto level = static_cast<std::size_t>(depth);
    check<ModelFileError>(depth <= 4, source, ": the header is nested more than 4 levels deep");
    if (event == json::parse_event_t::object_start) {
      keys.resize(level + 1);
      keys[level].clear();
    } else if (event == json::parse_event_t::key) {
      const auto& key = parsed.get_ref<const std::string&>();
      check<ModelFileError>(keys[level - 1].insert(key).second, source, ": '", key,
                            "' occurs twice in the header");
    }
    return true;
  };
  try {
    json header = json::parse(text.begin(), text.end(), watch);
    check<ModelFileError>(header.is_object(), source, ": the header is not a JSON object");
    return header;
  } catch (const json::exception& error) {
    throw ModelFileError(concat(source, ": the header is not valid JSON: ", error.what()));
  }
}

const json& member(const json& object, const char* key, const std::string& source,
                   const std::string& name) {
  check<ModelFileError>(object.is_object() && object.contains(key), source, ": tensor '", name,
                        "' has no '", key, "' in the header");
  return object.at(key);
}

std::vector<std::int64_t> integers(const json& value, const char* key, const std::string& source,
                                   const std::string& name) {
  const auto fits = [](const json& element) {
    return element.is_number_unsigned() &&
           element.get<std::uint64_t>() <=
               static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max());
  };
  check<ModelFileError>(value.is_array() && std::all_of(value.begin(), value.end(), fits), source,
                        ": '", key, "' of tensor '", name,
                        "' is no list of non-negative 64-bit integers");
  return value.get<std::vector<std::int64_t>>();
}

struct PlacedTensor {
  SafetensorsTensor tensor;
  std::uint64_t begin = 0, end = 0;
};

PlacedTensor parse_tensor(const std::string& name, const json& value, const std::string& source) {
  PlacedTensor result;
  result.tensor.name = name;
  const json& dtype = member(value, "dtype", source, name);
  check<ModelFileError>(dtype.is_string(), source, ": 'dtype' of tensor '", name, "' is no string");
  result.tensor.dtype = dtype.get<std::string>();
  result.tensor.shape = integers(member(value, "shape", source, name), "shape", source, name);
  const std::vector<std::int64_t> offsets =
      integers(member(value, "data_offsets", source, name), "data_offsets", source, name);
  check<ModelFileError>(offsets.size() == 2 && offsets[0] <= offsets[1], source,
                        ": 'data_offsets' of tensor '", name, "' is no [begin, end]");
  result.begin = static_cast<std::uint64_t>(offsets[0]);
  result.end = static_cast<std::uint64_t>(offsets[1]);
  const std::uint64_t expected = data_bytes(result.tensor, source);
  check<ModelFileError>(result.end - result.begin == expected, source, ": tensor '", name, "' ",
                        result.tensor.dtype, " ", result.tensor.shape_text(), " needs ", expected,
                        " bytes but its data_offsets span ", result.end - result.begin);
  return result;
}

std::map<std::string, std::string> parse_metadata(const json& value, const std::string& source) {
  const auto is_string = [](const json& element) { return element.is_string(); };
  check<ModelFileError>(value.is_object() && std::all_of(value.begin(), value.end(), is_string),
                        source, ": '", kMetadataKey, "' must map strings to strings");
  return value.get<std::map<std::string, std::string>>();
}

/// Orders the tensors by position and gives them their data; the ranges must tile it.
void place(std::vector<PlacedTensor>& placed, std::span<const std::byte> data,
           const std::string& source) {
  std::sort(placed.begin(), placed.end(), [](const PlacedTensor& a, const PlacedTensor& b) {
    return std::tie(a.begin, a.end, a.tensor.name) < std::tie(b.begin, b.end, b.tensor.name);
  });
  std::uint64_t position = 0;
  for (PlacedTensor& entry : placed) {
    check<ModelFileError>(entry.begin == position, source, ": data of tensor '", entry.tensor.name,
                          "' begins at byte ", entry.begin,
                          entry.begin < position ? ", inside its predecessor, which ends at "
                                                 : ", after a gap that begins at ",
                          position);
    check<ModelFileError>(entry.end <= data.size(), source, ": data of tensor '", entry.tensor.name,
                          "' ends at byte ", entry.end, " but the file has only ", data.size(),
                          " bytes of data; it was cut short, fetch or save it again");
    entry.tensor.data = data.subspan(entry.begin, entry.end - entry.begin);
    position = entry.end;
  }
  check<ModelFileError>(position == data.size(), source, ": the file has ", data.size(),
                        " bytes of data but its tensors end at byte ", position);
}

/// Read-only mapping of a whole file.
std::shared_ptr<void> map_file(const std::string& path, std::size_t& bytes) {
  const auto fail = [&path]() {
    throw ModelFileError(concat("cannot read '", path, "': ", std::strerror(errno)));
  };
  const int descriptor = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (descriptor < 0) fail();
  const std::shared_ptr<void> closer(nullptr, [descriptor](void*) { ::close(descriptor); });
  struct stat status {};
  if (::fstat(descriptor, &status) != 0) fail();
  check<ModelFileError>(S_ISREG(status.st_mode), "cannot read '", path, "': it is no regular file");
  bytes = static_cast<std::size_t>(status.st_size);
  if (bytes == 0) return nullptr;  // mmap refuses an empty file
  void* const memory = ::mmap(nullptr, bytes, PROT_READ, MAP_PRIVATE, descriptor, 0);
  if (memory == MAP_FAILED) fail();
  return {memory, [bytes](void* address) { ::munmap(address, bytes); }};
}

template <typename T, typename Convert>
void convert(std::span<const std::byte> data, std::span<float> values, Convert to_f32) {
  for (std::size_t i = 0; i < values.size(); ++i) {
    T element;
    std::memcpy(&element, data.data() + i * sizeof(T), sizeof(T));
    values[i] = to_f32(element);
  }
}

}  // namespace

std::string SafetensorsInfo::shape_text() const {
  std::string text = "[";
  for (const std::int64_t dim : shape) {
    text += concat(text.size() > 1 ? ", " : "", dim);
  }
  return text + "]";
}

std::string_view safetensors_dtype(DType dtype) {
  switch (dtype) {
    case DType::f32:
      return "F32";
    case DType::bf16:
      return "BF16";
    case DType::f16:
      return "F16";
    case DType::s32:
      return "I32";
    case DType::s8:
      return "I8";
  }
  return "?";
}

SafetensorsContent parse_safetensors(std::span<const std::byte> file, const std::string& source) {
  check<ModelFileError>(file.size() >= kLengthBytes, source, ": a safetensors file begins with ",
                        kLengthBytes, " bytes of header length, this one has only ", file.size());
  std::uint64_t header_bytes = 0;
  std::memcpy(&header_bytes, file.data(), kLengthBytes);
  check<ModelFileError>(
      header_bytes <= std::min<std::uint64_t>(kMaxHeaderBytes, file.size() - kLengthBytes), source,
      ": the header length is ", header_bytes, " in a file of ", file.size(),
      " bytes; this is no safetensors file, or it was cut short");
  const auto* const text = reinterpret_cast<const char*>(file.data()) + kLengthBytes;
  const json header = parse_header({text, header_bytes}, source);

  SafetensorsContent content;
  std::vector<PlacedTensor> placed;
  for (const auto& [name, value] : header.items()) {
    if (name == kMetadataKey) {
      content.metadata = parse_metadata(value, source);
    } else {
      placed.push_back(parse_tensor(name, value, source));
    }
  }
  place(placed, file.subspan(kLengthBytes + header_bytes), source);
  content.tensors.reserve(placed.size());
  for (PlacedTensor& entry : placed) content.tensors.push_back(std::move(entry.tensor));
  return content;
}

SafetensorsFile::SafetensorsFile(const std::filesystem::path& path) : path_(path.string()) {
  std::size_t bytes = 0;
  mapping_ = map_file(path_, bytes);
  content_ = parse_safetensors({static_cast<const std::byte*>(mapping_.get()), bytes}, path_);
  for (std::size_t i = 0; i < content_.tensors.size(); ++i) {
    index_.emplace(content_.tensors[i].name, i);
  }
}

const SafetensorsTensor* SafetensorsFile::find(std::string_view name) const {
  const auto found = index_.find(name);
  return found == index_.end() ? nullptr : &content_.tensors[found->second];
}

const SafetensorsTensor& SafetensorsFile::at(std::string_view name) const {
  const SafetensorsTensor* const tensor = find(name);
  check<ModelFileError>(tensor != nullptr, path_, ": there is no tensor '", name, "'");
  return *tensor;
}

void SafetensorsFile::read_f32(const SafetensorsTensor& tensor, std::span<float> values) const {
  const std::size_t bytes = element_bytes(tensor.dtype);
  check<ModelFileError>(tensor.data.size() == values.size() * bytes, path_, ": tensor '",
                        tensor.name, "' ", tensor.shape_text(), " read into ", values.size(),
                        " values");
  if (tensor.dtype == "F32") {
    std::memcpy(values.data(), tensor.data.data(), tensor.data.size());
  } else if (tensor.dtype == "F16") {
    convert<Float16>(tensor.data, values, [](Float16 value) { return to_float(value); });
  } else if (tensor.dtype == "BF16") {
    convert<BFloat16>(tensor.data, values, [](BFloat16 value) { return to_float(value); });
  } else if (tensor.dtype == "F64") {
    convert<double>(tensor.data, values, [](double value) { return static_cast<float>(value); });
  } else {
    throw ModelFileError(concat(path_, ": tensor '", tensor.name, "' is ", tensor.dtype,
                                ": expected F32, F16, BF16 or F64"));
  }
}

SafetensorsWriter::SafetensorsWriter(const std::filesystem::path& path,
                                     const std::vector<SafetensorsInfo>& tensors,
                                     const std::map<std::string, std::string>& metadata)
    : path_(path.string()), file_(path) {
  nlohmann::ordered_json header;
  header[kMetadataKey] = metadata;
  for (const SafetensorsInfo& info : tensors) {
    check<ModelFileError>(!header.contains(info.name), path_, ": tensor '", info.name,
                          "' is to be written twice");
    const std::uint64_t begin = missing_bytes_;
    missing_bytes_ += data_bytes(info, path_);
    header[info.name] = {
        {"dtype", info.dtype}, {"shape", info.shape}, {"data_offsets", {begin, missing_bytes_}}};
  }
  std::string text = header.dump();
  text.resize((text.size() + 7) / 8 * 8, ' ');  // readers map the data: keep it aligned
  const std::uint64_t header_bytes = text.size();
  file_.write(std::as_bytes(std::span(&header_bytes, 1)));
  file_.write(text);
}

void SafetensorsWriter::write(std::span<const std::byte> data) {
  check<ModelFileError>(data.size() <= missing_bytes_, path_, ": ", data.size(),
                        " bytes written where the header leaves ", missing_bytes_);
  file_.write(data);
  missing_bytes_ -= data.size();
}

void SafetensorsWriter::commit() {
  check<ModelFileError>(missing_bytes_ == 0, path_, ": ", missing_bytes_,
                        " bytes of data were not written");
  file_.commit();
}

}  // namespace bitfall
