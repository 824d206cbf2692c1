#include "engine/slices.h"

#include <algorithm>

#include "core/error.h"
#include "quantizer/quantizer.h"

namespace bitfall {
namespace {

/// Elements that travel at a time.
constexpr std::int64_t kStagingElements = std::int64_t{1} << 20;

ParameterStore::WorkingCopy working_copy(const Config& config) {
  const bool shared = config.compute_dtype == DType::f32 && !config.quantize.enabled;
  return shared ? ParameterStore::WorkingCopy::shared : ParameterStore::WorkingCopy::separate;
}

Partition make_partition(const Config& config, const ParameterStore& store, int world_size) {
  std::vector<std::int64_t> units(store.parameters().size(), 1);
  if (config.quantize.enabled) units = elements_per_scale(config.quantize, store.parameters());
  std::vector<DivisibleRange> parts;
  for (std::size_t index = 0; index < units.size(); ++index) {
    // Where no scale binds, borders keep the alignment.
    const std::int64_t unit = units[index] == 1 ? kFlatAlignment : units[index];
    parts.push_back({store.parameters()[index].range(), unit});
  }
  return {store.numel(), world_size, parts};
}

}  // namespace

ParameterStore load_store(Backend& backend, Communicator& communicator, const Config& config,
                          const std::vector<ParameterSpec>& parameters,
                          const LoadWeights& load_weights) {
  ParameterStore store(backend, parameters, config.compute_dtype, working_copy(config));
  load_weights(backend, store);
  communicator.broadcast(store.master(), 0);
  if (config.zero_stage == 0 || communicator.world_size() == 1) return store;
  store.keep_slice(backend, make_partition(config, store, communicator.world_size()),
                   communicator.rank(),
                   config.zero_stage == 1 ? ParameterStore::Slices::masters
                                          : ParameterStore::Slices::masters_and_gradients);
  return store;
}

void gather_slices(Communicator& communicator, const Partition& partition, const Tensor& flat) {
  if (partition.world_size() == 1) return;
  for (int rank = 0; rank < partition.world_size(); ++rank) {
    const FlatRange slice = partition.slice(rank);
    communicator.broadcast(flat.flat_slice(slice.begin, slice.numel), rank);
  }
}

GatheredParameters::GatheredParameters(Backend& backend, Communicator& communicator,
                                       const ParameterStore& store, std::vector<Tensor> slices)
    : backend_(backend), communicator_(communicator), store_(store), slices_(std::move(slices)) {
  if (store.partition().world_size() == 1) return;
  staging_buffer_ =
      backend.allocate(static_cast<std::size_t>(kStagingElements) * size_in_bytes(DType::f32));
  staging_ = staging_buffer_.view(DType::f32, Shape{kStagingElements});
}

void GatheredParameters::next(std::span<float> values) {
  const std::vector<Parameter>& parameters = store_.parameters();
  const Parameter& parameter = parameters.at(taken_ % parameters.size());
  const Tensor& slice = slices_.at(taken_ / parameters.size());
  ++taken_;
  for (const Partition::Piece& piece : store_.partition().pieces(parameter.range())) {
    for (std::int64_t done = 0; done < piece.range.numel; done += kStagingElements) {
      const FlatRange range{piece.range.begin + done,
                            std::min(kStagingElements, piece.range.numel - done)};
      const auto first = static_cast<std::size_t>(range.begin - parameter.offset);
      gather(
          slice, piece.rank, range,
          values.empty() ? values : values.subspan(first, static_cast<std::size_t>(range.numel)));
    }
  }
}

void GatheredParameters::gather(const Tensor& slice, int owner, const FlatRange& range,
                                std::span<float> values) {
  const bool is_mine = intersection(range, store_.owned()).numel > 0;
  Tensor source =
      is_mine ? slice.flat_slice(range.begin - store_.owned().begin, range.numel) : Tensor();
  if (staging_) {
    const Tensor staged = staging_.flat_slice(0, range.numel);
    if (is_mine) backend_.copy(source, staged);
    communicator_.broadcast(staged, owner);
    source = staged;
  }
  if (values.empty()) return;
  backend_.copy(source, Tensor{values.data(), DType::f32, source.shape, Device::cpu});
}

void GatheredParameters::skip_rest() {
  if (!staging_) return;
  while (taken_ < store_.parameters().size() * slices_.size()) next({});
}

}  // namespace bitfall
