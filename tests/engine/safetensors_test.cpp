#include "engine/safetensors.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstring>
#include <fstream>

#include "core/error.h"
#include "tests/support/temporary_folder.h"

namespace bitfall {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

template <typename T>
std::span<const std::byte> bytes_of(const std::vector<T>& values) {
  return std::as_bytes(std::span(values));
}

std::vector<std::byte> file_bytes(std::uint64_t header_bytes, const std::string& header,
                                  std::size_t data_bytes) {
  std::vector<std::byte> file(8 + header.size() + data_bytes);
  std::memcpy(file.data(), &header_bytes, 8);
  std::memcpy(file.data() + 8, header.data(), header.size());
  return file;
}

/// The message with which a header over `data_bytes` of data is refused, or "" if it is accepted.
std::string refusal(const std::string& header, std::size_t data_bytes) {
  try {
    parse_safetensors(file_bytes(header.size(), header, data_bytes), "m.safetensors");
  } catch (const ModelFileError& error) {
    return error.what();
  }
  return "";
}

void write_text(const std::filesystem::path& path, const std::string& text) {
  std::ofstream(path, std::ios::binary) << text;
}

std::string read_text(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

TEST(Safetensors, WhatIsWrittenIsReadBack) {
  const TemporaryFolder folder;
  const auto path = folder.path() / "model.safetensors";
  const std::vector<float> weight{1.0f, -2.5f, 3.0f, 4.0f, 5.0f, 6.0f};
  const std::vector<std::int64_t> ids{7, 8};
  {
    SafetensorsWriter writer(path,
                             {{"weight", "F32", {2, 3}}, {"ids", "I64", {2}}, {"e", "F32", {0}}});
    writer.write(bytes_of(weight).first(8));
    writer.write(bytes_of(weight).subspan(8));
    writer.write(bytes_of(ids));
    writer.commit();
  }
  const SafetensorsFile file(path);
  EXPECT_EQ(file.metadata().at("format"), "pt");
  ASSERT_EQ(file.tensors().size(), 3u);
  EXPECT_THAT(file.at("weight").shape, ElementsAre(2, 3));
  std::vector<float> values(6);
  file.read_f32(file.at("weight"), values);
  EXPECT_EQ(values, weight);
  EXPECT_EQ(std::memcmp(file.at("ids").data.data(), ids.data(), 16), 0);
  EXPECT_EQ(reinterpret_cast<std::uintptr_t>(file.at("weight").data.data()) % 8, 0u);
  EXPECT_EQ(file.find("bias"), nullptr);
  EXPECT_THROW(file.at("bias"), ModelFileError);
  EXPECT_THROW(file.read_f32(file.at("ids"), std::span(values).first(2)), ModelFileError);
  EXPECT_THROW(file.read_f32(file.at("weight"), std::span(values).first(2)), ModelFileError);
}

TEST(Safetensors, HalfTypesAreWidened) {
  const TemporaryFolder folder;
  const auto path = folder.path() / "half.safetensors";
  SafetensorsWriter writer(path, {{"a", "BF16", {2}}, {"b", "F16", {2}}, {"c", "F64", {1}}});
  writer.write(bytes_of(std::vector<std::uint16_t>{0x3f80, 0xc020}));
  writer.write(bytes_of(std::vector<std::uint16_t>{0x3c00, 0xc100}));
  writer.write(bytes_of(std::vector<double>{0.5}));
  writer.commit();
  const SafetensorsFile file(path);
  std::vector<float> values(2);
  for (const char* const name : {"a", "b"}) {
    file.read_f32(file.at(name), values);
    EXPECT_THAT(values, ElementsAre(1.0f, -2.5f)) << name;
  }
  file.read_f32(file.at("c"), std::span(values).first(1));
  EXPECT_EQ(values[0], 0.5f);
}

TEST(Safetensors, HostileHeadersAreRefused) {
  const auto tensor = [](const std::string& dtype, const std::string& shape,
                         const std::string& offsets) {
    return R"({"t":{"dtype":")" + dtype + R"(","shape":)" + shape + R"(,"data_offsets":)" +
           offsets + "}}";
  };
  EXPECT_EQ(refusal(tensor("F32", "[2,2]", "[0,16]"), 16), "");
  EXPECT_EQ(refusal(tensor("F32", "[]", "[0,4]"), 4), "");
  const std::vector<std::tuple<std::string, std::size_t, std::string>> cases{
      {"{", 0, "not valid JSON"},
      {"[]", 0, "not a JSON object"},
      {"{\"t\":\"\xff\xfe\"}", 0, "not valid JSON"},
      {R"({"t":1})", 0, "tensor 't' has no 'dtype'"},
      {R"({"t":[[[[[[1]]]]]]})", 0, "nested"},
      {R"({"__metadata__":{"a":1}})", 0, "must map strings to strings"},
      {R"({"t":{"dtype":1,"shape":[],"data_offsets":[0,4]}})", 4, "'dtype' of tensor 't'"},
      {tensor("F31", "[1]", "[0,4]"), 4, "unknown dtype 'F31'"},
      {tensor("F32", "[-1]", "[0,4]"), 4, "'shape' of tensor 't'"},
      {tensor("F32", "[1.5]", "[0,4]"), 4, "'shape' of tensor 't'"},
      {tensor("F32", "[18446744073709551615]", "[0,4]"), 4, "'shape' of tensor 't'"},
      {tensor("F32", "[4294967296,4294967296]", "[0,0]"), 0, "impossible shape"},
      {tensor("F32", "[1]", "[0]"), 4, "no [begin, end]"},
      {tensor("F32", "[1]", "[4,0]"), 4, "no [begin, end]"},
      {tensor("F32", "[2]", "[0,4]"), 4, "needs 8 bytes but its data_offsets span 4"},
      {tensor("F32", "[2]", "[0,8]"), 4, "cut short"},
      {tensor("F32", "[1]", "[4,8]"), 8, "after a gap that begins at 0"},
      {tensor("F32", "[1]", "[0,4]"), 8, "8 bytes of data but its tensors end at byte 4"},
      {R"({"a":{"dtype":"I8","shape":[3],"data_offsets":[0,3]},)"
       R"("b":{"dtype":"I8","shape":[3],"data_offsets":[2,5]}})",
       5, "inside its predecessor"},
      {R"({"t":{"dtype":"I8","shape":[1],"data_offsets":[0,1]},)"
       R"("t":{"dtype":"I8","shape":[1],"data_offsets":[0,1]}})",
       1, "'t' occurs twice"},
      {R"({"t":{"dtype":"I8","dtype":"U8","shape":[1],"data_offsets":[0,1]}})", 1,
       "'dtype' occurs twice"}};
  for (const auto& [header, data_bytes, expected] : cases) {
    const std::string message = refusal(header, data_bytes);
    EXPECT_THAT(message, HasSubstr(expected)) << header;
    EXPECT_THAT(message, HasSubstr("m.safetensors")) << header;
  }
}

TEST(Safetensors, ImpossibleHeaderLengthsAreRefused) {
  for (const std::uint64_t length :
       {std::uint64_t{3}, std::uint64_t{100'000'001}, ~std::uint64_t{0}, ~std::uint64_t{0} - 7}) {
    EXPECT_THROW(parse_safetensors(file_bytes(length, "{}", 0), "m"), ModelFileError) << length;
  }
  EXPECT_THROW(parse_safetensors({}, "m"), ModelFileError);
  EXPECT_TRUE(parse_safetensors(file_bytes(2, "{}", 0), "m").tensors.empty());
}

TEST(Safetensors, UnreadableFilesAreNamed) {
  const TemporaryFolder folder;
  const auto message = [](const std::filesystem::path& path) -> std::string {
    try {
      const SafetensorsFile file(path);
    } catch (const ModelFileError& error) {
      return error.what();
    }
    return "";
  };
  EXPECT_THAT(message(folder.path() / "none"), HasSubstr("No such file"));
  EXPECT_THAT(message(folder.path()), HasSubstr("no regular file"));
  write_text(folder.path() / "empty", "");
  EXPECT_THAT(message(folder.path() / "empty"), HasSubstr("empty"));
}

TEST(Safetensors, AnUnfinishedWriteLeavesTheOldFile) {
  const TemporaryFolder folder;
  const auto path = folder.path() / "model.safetensors";
  write_text(path, "old");
  const std::vector<float> weight(4);
  {
    SafetensorsWriter writer(path, {{"weight", "F32", {4}}});
    writer.write(bytes_of(weight).first(8));
    EXPECT_THROW(writer.commit(), ModelFileError);
    EXPECT_THROW(writer.write(bytes_of(weight)), ModelFileError);
  }
  EXPECT_EQ(read_text(path), "old");
  EXPECT_THROW(SafetensorsWriter(path, {{"a", "F32", {1}}, {"a", "F32", {1}}}), ModelFileError);
  EXPECT_EQ(std::distance(std::filesystem::directory_iterator(folder.path()), {}), 1);
}

TEST(Safetensors, MissingFolderAndFullDiskAreErrors) {
  const TemporaryFolder folder;
  EXPECT_THROW(SafetensorsWriter(folder.path() / "none" / "m", {}), ModelFileError);
  if (::access("/dev/full", W_OK) != 0) GTEST_SKIP() << "the system has no /dev/full";
  // A link named like the temporary file leads the writer to a device without any space.
  const auto path = folder.path() / "m";
  std::filesystem::create_symlink("/dev/full", concat(path.string(), ".tmp-", ::getpid()));
  EXPECT_THROW(SafetensorsWriter(path, {{"weight", "F32", {4}}}), ModelFileError);
}

}  // namespace
}  // namespace bitfall
