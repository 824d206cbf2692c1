#include "engine/gradient_reducer.h"

#include <algorithm>

#include "core/error.h"

namespace bitfall {
namespace {

/// Blocks whose gradients are in memory at a time: one is reduced while the next is computed.
constexpr int kBlockBuckets = 2;

/// Views are aligned as in the flat buffers.
std::int64_t round_up(std::int64_t position) {
  return (position + kFlatAlignment - 1) / kFlatAlignment * kFlatAlignment;
}

}  // namespace

GradientReducer::GradientReducer(Backend& backend, Communicator& communicator,
                                 const ParameterStore& store)
    : backend_(backend), communicator_(communicator), store_(store), memory_(store.gradient()) {
  add_segments();
  if (is_sliced()) allocate_buckets();
  next_block_ = store_.num_blocks() - 1;
}

void GradientReducer::add_segments() {
  std::int64_t begin = 0;
  const auto add_until = [&](std::int64_t end, int block) {
    if (end > begin) segments_.push_back({{begin, end - begin}, block, begin, {}});
    begin = end;
  };
  for (int block = 0; block < store_.num_blocks(); ++block) {
    const FlatRange range = store_.block_range(block);
    add_until(range.begin, kNoBlock);
    add_until(range.end(), block);
  }
  add_until(store_.numel(), kNoBlock);
}

void GradientReducer::allocate_buckets() {
  std::int64_t longest = 0;
  for (const Segment& segment : segments_) {
    if (segment.block != kNoBlock) longest = std::max(longest, segment.range.numel);
  }
  longest = round_up(longest);
  const std::int64_t buckets = std::min(kBlockBuckets, store_.num_blocks());
  const std::int64_t before = store_.num_blocks() > 0 ? store_.block_range(0).begin : 0;
  std::int64_t end = std::max(buckets * longest, before);
  for (Segment& segment : segments_) {
    if (segment.block != kNoBlock) {
      segment.position = segment.block % kBlockBuckets * longest;
    } else if (segment.range.begin < before) {
      segment.position = segment.range.begin;  // written after all blocks
    } else {
      segment.position = round_up(end) + segment.range.begin % kFlatAlignment;
      end = segment.position + segment.range.numel;
    }
  }
  bucket_buffer_ = backend_.allocate(static_cast<std::size_t>(end) * sizeof(float));
  memory_ = bucket_buffer_.view(DType::f32, Shape{end});
  find_gaps();
}

void GradientReducer::find_gaps() {
  for (Segment& segment : segments_) {
    std::int64_t filled = segment.range.begin;
    const auto add_until = [&](std::int64_t begin) {
      if (begin > filled) segment.gaps.push_back({filled, begin - filled});
    };
    for (const Parameter& parameter : store_.parameters()) {
      if (intersection(segment.range, parameter.range()).numel == 0) continue;
      add_until(parameter.offset);
      filled = parameter.range().end();
    }
    add_until(segment.range.end());
  }
}

std::vector<Tensor> GradientReducer::views() const {
  std::vector<Tensor> result;
  for (const Parameter& parameter : store_.parameters()) {
    const auto segment = std::find_if(segments_.begin(), segments_.end(), [&](const Segment& one) {
      return one.range.begin <= parameter.offset && parameter.range().end() <= one.range.end();
    });
    result.push_back(memory(*segment, parameter.range()).reshaped(parameter.shape));
  }
  return result;
}

Tensor GradientReducer::memory(const Segment& segment, const FlatRange& range) const {
  return memory_.flat_slice(segment.position + range.begin - segment.range.begin, range.numel);
}

void GradientReducer::start(int block, Accumulate accumulate) {
  check_order(block);
  if (is_sliced()) deliver();
  for (const Segment& segment : segments_) {
    if (segment.block != block) continue;
    if (is_sliced()) {
      reduce_to_owners(segment);
    } else {
      communicator_.all_reduce_async(memory(segment, segment.range), ReduceOp::mean);
    }
  }
  if (!is_sliced()) return;
  under_way_ = Reduction{block, accumulate};
  if (block <= 0) deliver();  // what follows is written to its memory
}

void GradientReducer::check_order(int block) {
  const int last = store_.num_blocks() - 1;
  // A backward pass that failed may have left off anywhere.
  check<ShapeError>(block == next_block_ || block == last, "gradients of block ", block,
                    " are ready, expected those of block ", next_block_,
                    ": blocks come from the last to the first, then ", kNoBlock);
  next_block_ = block == kNoBlock ? last : block - 1;
}

void GradientReducer::reduce_to_owners(const Segment& segment) {
  // Others that share the memory have their gaps elsewhere.
  for (const FlatRange& gap : segment.gaps) backend_.fill_zero(memory(segment, gap));
  for (const Partition::Piece& piece : store_.partition().pieces(segment.range)) {
    communicator_.reduce_async(memory(segment, piece.range), ReduceOp::mean, piece.rank);
  }
}

void GradientReducer::deliver() {
  if (!under_way_) return;
  communicator_.wait_all();
  const float keep = under_way_->accumulate == Accumulate::yes ? 1.0f : 0.0f;
  for (const Segment& segment : segments_) {
    const FlatRange mine = intersection(segment.range, store_.owned());
    if (segment.block != under_way_->block || mine.numel == 0) continue;
    backend_.axpby(1.0f, memory(segment, mine), keep, store_.gradient(mine));
  }
  under_way_.reset();
}

void GradientReducer::start_with_zeros(int block, Accumulate accumulate) {
  for (const Segment& segment : segments_) {
    if (segment.block == block) backend_.fill_zero(memory(segment, segment.range));
  }
  start(block, accumulate);
}

void GradientReducer::finish() {
  communicator_.wait_all();
  deliver();
}

std::vector<double> GradientReducer::squared_norms() const {
  std::vector<double> norms;
  for (const Parameter& parameter : store_.parameters()) {
    FlatRange range = parameter.range();
    if (is_sliced()) range = intersection(range, store_.owned());
    norms.push_back(range.numel == 0 ? 0.0 : backend_.squared_sum(store_.gradient(range)));
  }
  return is_sliced() ? sum_over_ranks(communicator_, std::move(norms)) : norms;
}

void GradientReducer::decide_update(const Tensor& loss, const UpdateLimits& limits,
                                    const Tensor& decision) const {
  const Tensor gradient = store_.gradient();
  if (!is_sliced()) return backend_.decide_update(loss, gradient, limits, decision);
  // Ranks add in f64, which only hosts do: so this one waits here.
  const double squared_norm =
      sum_over_ranks(communicator_, {backend_.squared_sum(gradient)}).front();
  backend_.decide_update(loss, squared_norm, limits, decision);
}

}  // namespace bitfall
