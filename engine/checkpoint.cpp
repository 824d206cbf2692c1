#include "engine/checkpoint.h"

#include <set>

#include "core/error.h"
#include "engine/atomic_file.h"
#include "engine/checkpoint_files.h"
#include "engine/checkpoint_state.h"
#include "engine/safetensors.h"

namespace bitfall {
namespace {

namespace fs = std::filesystem;

const std::string kModelFile = "model.safetensors";
const std::string kOptimizerFile = "optimizer.safetensors";
const std::string kStateFile = "state.json";
const std::string kLatestFile = "latest";
const std::string kClientFile = "client.safetensors";  // only where the caller has tensors
const std::vector<std::string> kFiles = {kModelFile, kOptimizerFile, kStateFile};

/// In the model file a tensor has the name of its parameter, in the optimizer file one of these
/// endings too.
const std::vector<std::string> kNoEnding = {""};
const std::vector<std::string> kMomentEndings = {".exp_avg", ".exp_avg_sq"};

std::vector<std::string> moment_endings(std::size_t moments) {
  return {kMomentEndings.begin(), kMomentEndings.begin() + static_cast<std::ptrdiff_t>(moments)};
}

std::vector<std::int64_t> dims(const Shape& shape) {
  std::vector<std::int64_t> result;
  for (std::size_t axis = 0; axis < shape.rank(); ++axis) result.push_back(shape[axis]);
  return result;
}

std::span<float> host_floats(std::vector<float>& values, std::int64_t numel) {
  values.resize(static_cast<std::size_t>(numel));
  return values;
}

Tensor host_tensor(std::span<float> values) {
  return {values.data(), DType::f32, Shape{static_cast<std::int64_t>(values.size())}, Device::cpu};
}

/// Takes the next values, endings.size() of every parameter.
void write_tensors(const fs::path& path, const ParameterStore& store,
                   const std::vector<std::string>& endings, GatheredParameters& values) {
  std::vector<SafetensorsInfo> infos;
  for (const std::string& ending : endings) {
    for (const Parameter& parameter : store.parameters()) {
      infos.push_back({parameter.name + ending, "F32", dims(parameter.shape)});
    }
  }
  SafetensorsWriter writer(path, infos);
  std::vector<float> buffer;
  for (std::size_t flat = 0; flat < endings.size(); ++flat) {
    for (const Parameter& parameter : store.parameters()) {
      const std::span<float> floats = host_floats(buffer, parameter.numel);
      values.next(floats);
      writer.write(std::as_bytes(floats));
    }
  }
  writer.commit();
}

/// Fills `slice` with what `ending` stands for.
void read_tensors(const SafetensorsFile& file, Backend& backend, const ParameterStore& store,
                  const std::string& ending, const Tensor& slice) {
  const FlatRange owned = store.owned();
  std::vector<float> buffer;
  for (const Parameter& parameter : store.parameters()) {
    const FlatRange mine = intersection(parameter.range(), owned);
    if (mine.numel == 0) continue;
    const std::span<float> values = host_floats(buffer, parameter.numel);
    file.read_f32(file.at(parameter.name + ending), values);
    backend.copy(host_tensor(values).flat_slice(mine.begin - parameter.offset, mine.numel),
                 slice.flat_slice(mine.begin - owned.begin, mine.numel));
  }
}

/// Names and shapes of the file are exactly those of the model.
void check_fits(const fs::path& path, const ParameterStore& store,
                const std::vector<std::string>& endings) {
  const SafetensorsFile file(path);
  std::size_t expected = 0;
  for (const std::string& ending : endings) {
    for (const Parameter& parameter : store.parameters()) {
      ++expected;
      const SafetensorsTensor* tensor = file.find(parameter.name + ending);
      check<CheckpointError>(tensor != nullptr, path.string(), ": has no '", parameter.name, ending,
                             "', it belongs to another model; resume with the model it was "
                             "trained from");
      check<CheckpointError>(tensor->shape == dims(parameter.shape) && tensor->dtype == "F32",
                             path.string(), ": '", tensor->name, "' is ", tensor->dtype, " ",
                             tensor->shape_text(), ", but the model has F32 ",
                             parameter.shape.to_string(), "; resume with the same model");
    }
  }
  check<CheckpointError>(
      file.tensors().size() == expected, path.string(), ": has ", file.tensors().size(),
      " tensors, but the model has ", expected,
      ", it belongs to another model; resume with the model it was trained from");
}

void write_client_tensors(const fs::path& path, std::span<const ClientTensor> tensors) {
  std::vector<SafetensorsInfo> infos;
  for (const ClientTensor& tensor : tensors) infos.push_back(tensor.info);
  SafetensorsWriter writer(path, infos);
  for (const ClientTensor& tensor : tensors) writer.write(tensor.bytes);
  writer.commit();
}

/// A tag is one folder name.
void check_tag(const std::string& tag, const fs::path& where) {
  const bool plain = !tag.empty() && tag.find_first_of("/\n\r") == std::string::npos &&
                     tag.front() != '.' && tag.size() <= 200;
  check<CheckpointError>(plain, where.string(), ": '", tag.substr(0, 60),
                         "' is no checkpoint tag; expected a folder name like global_step100");
}

std::string latest_tag(const fs::path& directory) {
  const fs::path latest = directory / kLatestFile;
  check<CheckpointError>(fs::exists(latest), directory.string(),
                         ": no checkpoint here (no file 'latest'); give the folder that holds it");
  std::string tag = read_text(latest);
  while (!tag.empty() && (tag.back() == '\n' || tag.back() == '\r')) tag.pop_back();
  check_tag(tag, latest);
  return tag;
}

/// The folder of a checkpoint, and its files, which are as they were written.
struct VerifiedFolder {
  VerifiedFolder(const fs::path& directory, const std::string& tag) {
    if (!tag.empty()) check_tag(tag, directory);
    path = directory / (tag.empty() ? latest_tag(directory) : tag);
    check<CheckpointError>(fs::is_directory(path), path.string(), ": there is no such checkpoint");
    if (fs::exists(path / kClientFile)) files.push_back(kClientFile);
    verify_checksums(path, files);
  }

  fs::path path;
  std::vector<std::string> files = kFiles;
};

}  // namespace

void save_checkpoint(const fs::path& directory, const std::string& tag, const ParameterStore& store,
                     GatheredParameters& values, const TrainingState& state,
                     std::span<const ClientTensor> client_tensors) {
  check_tag(tag, directory);
  try {
    StagedFolder folder(directory, tag);
    write_tensors(folder.path() / kModelFile, store, kNoEnding, values);
    write_tensors(folder.path() / kOptimizerFile, store, moment_endings(values.num_slices() - 1),
                  values);
    AtomicFile state_file(folder.path() / kStateFile);
    state_file.write(to_json_text(state));
    state_file.commit();
    std::vector<std::string> files = kFiles;
    if (!client_tensors.empty()) {
      write_client_tensors(folder.path() / kClientFile, client_tensors);
      files.push_back(kClientFile);
    }
    AtomicFile checksum_file(folder.path() / kChecksumFile);
    checksum_file.write(checksums_of(folder.path(), files));
    checksum_file.commit();
    folder.commit();
    AtomicFile latest(directory / kLatestFile);
    latest.write(tag);
    latest.commit();
  } catch (const ModelFileError& error) {
    throw CheckpointError(concat("cannot write checkpoint ", (directory / tag).string(), ": ",
                                 error.what(), "; earlier checkpoints are untouched"));
  }
}

ClientCheckpoint read_client_checkpoint(const fs::path& directory, const std::string& tag) {
  const VerifiedFolder folder(directory, tag);
  const fs::path state = folder.path / kStateFile;
  const bool has_tensors = folder.files.size() > kFiles.size();
  return {parse_training_state(read_text(state), state.string()).client_state,
          has_tensors ? folder.path / kClientFile : fs::path()};
}

LoadedCheckpoint::LoadedCheckpoint(const fs::path& directory, const std::string& tag,
                                   const ParameterStore& store, const CheckpointTensors& tensors,
                                   const std::string& config) {
  folder_ = VerifiedFolder(directory, tag).path;
  const fs::path state_path = folder_ / kStateFile;
  state_ = parse_training_state(read_text(state_path), state_path.string());
  if (!config.empty()) check_same_config(state_.config, config, state_path.string());
  try {
    check_fits(folder_ / kModelFile, store, kNoEnding);
    if (!tensors.moments.empty()) {
      check_fits(folder_ / kOptimizerFile, store, moment_endings(tensors.moments.size()));
    }
  } catch (const ModelFileError& error) {
    throw CheckpointError(error.what());
  }
}

void LoadedCheckpoint::read(Backend& backend, const ParameterStore& store,
                            const CheckpointTensors& tensors) const {
  try {
    read_tensors(SafetensorsFile(folder_ / kModelFile), backend, store, "", tensors.master);
    const SafetensorsFile optimizer(folder_ / kOptimizerFile);
    for (std::size_t i = 0; i < tensors.moments.size(); ++i) {
      read_tensors(optimizer, backend, store, kMomentEndings[i], tensors.moments[i]);
    }
  } catch (const ModelFileError& error) {
    throw CheckpointError(error.what());
  }
}

}  // namespace bitfall
