// ParameterStore: every parameter of a model in flat buffers.
//
// Three views of the same layout: master (f32), working (compute dtype) and gradient (f32). A block
// of the model is one contiguous range, so reductions, updates, checkpoints and slicing over ranks
// work on ranges and need no list of tensors. With ZeRO a rank keeps only its slice of the masters
// and, at stage 2, of the gradients; the working weights are always complete.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "core/backend.h"
#include "core/partition.h"
#include "core/tensor.h"

namespace bitfall {

/// Parameters that belong to no block of the encoder (embeddings, pooler, heads).
inline constexpr int kNoBlock = -1;

/// Elements: 64 bytes of f32.
inline constexpr std::int64_t kFlatAlignment = 16;

/// `adjacent` packs a parameter right behind its predecessor, so that several weights can be read
/// as one matrix (query, key and value); otherwise a parameter starts at a multiple of
/// kFlatAlignment.
enum class Placement { aligned, adjacent };

struct ParameterSpec {
  std::string name;  ///< as in Hugging Face checkpoints
  Shape shape;
  int block = kNoBlock;
  Placement placement = Placement::aligned;
};

struct Parameter {
  std::string name;
  Shape shape;
  int block = kNoBlock;
  std::int64_t offset = 0;  ///< elements into the flat buffers
  std::int64_t numel = 0;

  FlatRange range() const { return {offset, numel}; }
};

/// A part of a parameter, counted from the beginning of a rank's slice of the flat buffers.
struct OwnedPart {
  std::size_t parameter = 0;  ///< index
  std::int64_t begin = 0, numel = 0;
  std::int64_t first_element = 0;  ///< of the parameter
};

class ParameterStore {
 public:
  /// Lays out `specs` in order and allocates. With compute_dtype f32 and WorkingCopy::shared,
  /// working is the memory of master (nothing between them, so no second copy).
  ///
  /// Throws ConfigError if a name occurs twice or the specs of one block are not consecutive.
  enum class WorkingCopy { separate, shared };
  ParameterStore(Backend& backend, const std::vector<ParameterSpec>& specs, DType compute_dtype,
                 WorkingCopy working_copy);

  enum class Slices { masters, masters_and_gradients };
  /// From now on this rank keeps of `slices` only its part in `partition`. Masters stay what they
  /// are, sliced gradients become zero. At most once, since the rest is gone.
  void keep_slice(Backend& backend, const Partition& partition, int rank, Slices slices);
  const Partition& partition() const { return partition_; }
  /// What this rank keeps of the masters: everything before keep_slice().
  FlatRange owned() const { return owned_; }
  bool gradient_is_sliced() const { return gradient_is_sliced_; }

  const std::vector<Parameter>& parameters() const { return parameters_; }
  /// Throws ConfigError that names the parameter if there is none of that name.
  std::size_t index_of(std::string_view name) const;
  int num_blocks() const { return static_cast<int>(blocks_.size()); }
  /// What this rank keeps of each parameter, rising; parameters of which it has nothing are left
  /// out.
  std::vector<OwnedPart> owned_parts() const;
  /// Contiguous range of one block, 0 <= block < num_blocks().
  FlatRange block_range(int block) const;
  /// Flat length including alignment gaps; gaps hold zeros in every buffer.
  std::int64_t numel() const { return numel_; }
  DType compute_dtype() const { return compute_dtype_; }
  bool working_is_master() const { return working_buffer_.memory() == nullptr; }

  Tensor master() const { return master_; }      ///< [owned().numel] f32
  Tensor working() const { return working_; }    ///< [numel] compute dtype
  Tensor gradient() const { return gradient_; }  ///< [numel] or [owned().numel] f32
  /// Elements `range` of the whole as a 1-D view. Throws ShapeError if this rank does not keep all
  /// of them.
  Tensor master(const FlatRange& range) const { return view(master_, owned_, range, "master"); }
  Tensor working(const FlatRange& range) const {
    return view(working_, {0, numel_}, range, "working");
  }
  Tensor gradient(const FlatRange& range) const {
    return view(gradient_, gradient_is_sliced_ ? owned_ : FlatRange{0, numel_}, range, "gradient");
  }
  /// A whole parameter in its shape; throws as above.
  Tensor master(std::size_t index) const { return shaped(master(range_of(index)), index); }
  Tensor working(std::size_t index) const { return shaped(working(range_of(index)), index); }
  Tensor gradient(std::size_t index) const { return shaped(gradient(range_of(index)), index); }

  /// Views of all parameters over any flat buffer of this layout (f32 scratch weights, for
  /// example).
  std::vector<Tensor> views(const Tensor& flat) const;
  /// Views of the parameters of `block` over a buffer of block_range(block).numel elements.
  std::vector<Tensor> block_views(int block, const Tensor& flat) const;

 private:
  static Tensor view(const Tensor& kept, const FlatRange& held, const FlatRange& range,
                     const char* what);
  FlatRange range_of(std::size_t index) const { return parameters_.at(index).range(); }
  Tensor shaped(const Tensor& flat, std::size_t index) const {
    return flat.reshaped(parameters_[index].shape);
  }

  std::vector<Parameter> parameters_;
  std::vector<FlatRange> blocks_;
  std::int64_t numel_ = 0;
  DType compute_dtype_;
  Partition partition_;
  FlatRange owned_;
  bool gradient_is_sliced_ = false;
  Buffer master_buffer_, working_buffer_, gradient_buffer_;
  Tensor master_, working_, gradient_;
};

}  // namespace bitfall
