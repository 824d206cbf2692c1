#include "core/parameter_store.h"

#include <unordered_set>

namespace bitfall {
namespace {

std::int64_t round_up(std::int64_t value) {
  return (value + kFlatAlignment - 1) / kFlatAlignment * kFlatAlignment;
}

}  // namespace

ParameterStore::ParameterStore(Backend& backend, const std::vector<ParameterSpec>& specs,
                               DType compute_dtype, WorkingCopy working_copy)
    : compute_dtype_(compute_dtype) {
  std::unordered_set<std::string_view> names;
  int previous_block = kNoBlock;
  for (const ParameterSpec& spec : specs) {
    check<ConfigError>(names.insert(spec.name).second, "parameter '", spec.name, "' occurs twice");
    const std::int64_t offset = spec.placement == Placement::adjacent ? numel_ : round_up(numel_);
    const std::int64_t numel = spec.shape.numel();
    if (spec.block != kNoBlock) {
      if (spec.block != previous_block) {
        check<ConfigError>(spec.block == num_blocks(), "parameter '", spec.name, "' of block ",
                           spec.block, " follows block ", previous_block,
                           ": blocks must be consecutive");
        blocks_.push_back({offset, 0});
      }
      blocks_.back().numel = offset + numel - blocks_.back().begin;
    }
    previous_block = spec.block;
    parameters_.push_back({spec.name, spec.shape, spec.block, offset, numel});
    numel_ = offset + numel;
  }
  numel_ = round_up(numel_);
  partition_ = Partition(numel_);
  owned_ = {0, numel_};

  const auto bytes = static_cast<std::size_t>(numel_);
  master_buffer_ = backend.allocate(bytes * size_in_bytes(DType::f32));
  gradient_buffer_ = backend.allocate(bytes * size_in_bytes(DType::f32));
  master_ = master_buffer_.view(DType::f32, Shape{numel_});
  gradient_ = gradient_buffer_.view(DType::f32, Shape{numel_});
  if (compute_dtype == DType::f32 && working_copy == WorkingCopy::shared) {
    working_ = master_;
  } else {
    working_buffer_ = backend.allocate(bytes * size_in_bytes(compute_dtype));
    working_ = working_buffer_.view(compute_dtype, Shape{numel_});
  }
}

void ParameterStore::keep_slice(Backend& backend, const Partition& partition, int rank,
                                Slices slices) {
  const FlatRange slice = partition.slice(rank);
  const auto bytes = static_cast<std::size_t>(slice.numel) * size_in_bytes(DType::f32);
  const Tensor mine = master(slice);
  if (working_is_master()) {
    master_ = mine;
  } else {
    const Buffer buffer = backend.allocate(bytes);
    master_ = buffer.view(DType::f32, Shape{slice.numel});
    backend.copy(mine, master_);
    backend.synchronize();  // before the old memory goes
    master_buffer_ = buffer;
  }
  if (slices == Slices::masters_and_gradients) {
    gradient_buffer_ = backend.allocate(bytes);
    gradient_ = gradient_buffer_.view(DType::f32, Shape{slice.numel});
    gradient_is_sliced_ = true;
  }
  partition_ = partition;
  owned_ = slice;
}

std::size_t ParameterStore::index_of(std::string_view name) const {
  for (std::size_t index = 0; index < parameters_.size(); ++index) {
    if (parameters_[index].name == name) return index;
  }
  throw ConfigError(concat("the model has no parameter '", name, "'"));
}

std::vector<OwnedPart> ParameterStore::owned_parts() const {
  std::vector<OwnedPart> parts;
  for (std::size_t index = 0; index < parameters_.size(); ++index) {
    const FlatRange mine = intersection(range_of(index), owned_);
    if (mine.numel == 0) continue;
    parts.push_back(
        {index, mine.begin - owned_.begin, mine.numel, mine.begin - parameters_[index].offset});
  }
  return parts;
}

FlatRange ParameterStore::block_range(int block) const {
  check<ShapeError>(block >= 0 && block < num_blocks(), "block ", block, " is outside of 0..",
                    num_blocks() - 1);
  return blocks_[static_cast<std::size_t>(block)];
}

std::vector<Tensor> ParameterStore::views(const Tensor& flat) const {
  check_shape("flat parameter buffer", flat, Shape{numel_});
  std::vector<Tensor> result;
  result.reserve(parameters_.size());
  for (std::size_t index = 0; index < parameters_.size(); ++index) {
    const FlatRange range = range_of(index);
    result.push_back(shaped(flat.flat_slice(range.begin, range.numel), index));
  }
  return result;
}

std::vector<Tensor> ParameterStore::block_views(int block, const Tensor& flat) const {
  const FlatRange all = block_range(block);
  check_shape("flat buffer of a block", flat, Shape{all.numel});
  std::vector<Tensor> result;
  for (std::size_t index = 0; index < parameters_.size(); ++index) {
    if (parameters_[index].block != block) continue;
    const FlatRange range = range_of(index);
    result.push_back(shaped(flat.flat_slice(range.begin - all.begin, range.numel), index));
  }
  return result;
}

Tensor ParameterStore::view(const Tensor& kept, const FlatRange& held, const FlatRange& range,
                            const char* what) {
  check<ShapeError>(range.begin >= held.begin && range.end() <= held.end(), what, ": elements ",
                    range.begin, "..", range.end(), " of the flat buffers, but this rank keeps ",
                    held.begin, "..", held.end());
  return kept.flat_slice(range.begin - held.begin, range.numel);
}

}  // namespace bitfall
