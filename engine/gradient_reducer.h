// GradientReducer: where a model writes its gradients, and how they become means over the ranks.
//
// Up to ZeRO stage 1 every rank holds the whole gradient and ends with all of the mean. At stage 2
// a rank holds its slice only: a block's gradient is produced in a bucket, reduced to its owners
// and added to their slices, while the block below fills the other bucket. What lies before the
// blocks (embeddings), whose gradients come last, then takes the memory of both.
#pragma once

#include <optional>
#include <vector>

#include "core/backend.h"
#include "core/communicator.h"
#include "core/parameter_store.h"

namespace bitfall {

class GradientReducer {
 public:
  /// All must outlive the object; `store` has its final slices.
  GradientReducer(Backend& backend, Communicator& communicator, const ParameterStore& store);

  /// True at stage 2: every micro-batch is reduced by itself, and its gradients overwrite what the
  /// last one left in views(). Otherwise only the sum over micro-batches is reduced.
  bool reduces_every_micro_batch() const { return is_sliced(); }

  /// Per parameter, in its shape, f32. Views of different blocks may share memory (is_sliced).
  std::vector<Tensor> views() const;

  /// Starts the mean over ranks of the gradients in views() of `block` (kNoBlock: of all outside of
  /// blocks). Blocks come from the last to the first, then kNoBlock. `accumulate` says whether the
  /// means of earlier micro-batches stay in the sum (where every micro-batch is reduced). Where
  /// views share memory, those of block b - 1 (b = 0: those before the first block in flat order)
  /// may be written after start(b) has returned.
  ///
  /// Throws ShapeError for another order.
  void start(int block, Accumulate accumulate);
  /// start() of a rank that has no gradients of `block`.
  void start_with_zeros(int block, Accumulate accumulate);
  /// Waits until store.gradient() holds the means.
  void finish();

  /// Backend::decide_update for `loss` [1] f32 and the whole mean gradient, the same on every rank.
  /// After finish().
  void decide_update(const Tensor& loss, const UpdateLimits& limits, const Tensor& decision) const;
  /// The sum of squares of each parameter.
  std::vector<double> squared_norms() const;
  /// Memory beyond store.gradient().
  std::size_t bucket_bytes() const { return bucket_buffer_.bytes(); }

 private:
  /// Flat range of one block, or one of the ranges outside of blocks.
  struct Segment {
    FlatRange range;
    int block = kNoBlock;
    std::int64_t position = 0;    ///< of its beginning in memory_
    std::vector<FlatRange> gaps;  ///< between parameters, as in memory_
  };
  struct Reduction {
    int block = kNoBlock;
    Accumulate accumulate = Accumulate::no;
  };

  bool is_sliced() const { return store_.gradient_is_sliced(); }
  void add_segments();
  void find_gaps();
  void allocate_buckets();
  void check_order(int block);
  Tensor memory(const Segment& segment, const FlatRange& range) const;
  void reduce_to_owners(const Segment& segment);
  /// Waits for the reduction under way and adds its result to this rank's slice.
  void deliver();

  Backend& backend_;
  Communicator& communicator_;
  const ParameterStore& store_;
  std::vector<Segment> segments_;  ///< ascending; cover the flat buffers
  Buffer bucket_buffer_;           ///< stage 2 only
  Tensor memory_;                  ///< what views() point into
  std::optional<Reduction> under_way_;
  int next_block_ = kNoBlock;
};

}  // namespace bitfall
