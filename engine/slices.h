// Slices: what ranks that share flat buffers (ZeRO) do together. Collective; a rank that shares
// with nobody does nothing.
#pragma once

#include <functional>
#include <span>
#include <vector>

#include "core/backend.h"
#include "core/communicator.h"
#include "core/parameter_store.h"
#include "engine/config.h"

namespace bitfall {

/// Fills the master weights of the store.
using LoadWeights = std::function<void(Backend& backend, const ParameterStore& store)>;

/// A store with the masters that `load_weights` gives rank 0, in slices as config.zero_stage says:
/// of nearly equal size, between quantization groups.
///
/// Throws ConfigError as ParameterStore and elements_per_scale().
ParameterStore load_store(Backend& backend, Communicator& communicator, const Config& config,
                          const std::vector<ParameterSpec>& parameters,
                          const LoadWeights& load_weights);

/// Completes `flat` [numel], of which every rank has filled its slice.
void gather_slices(Communicator& communicator, const Partition& partition, const Tensor& flat);

/// Parameters of flat f32 buffers on the host of rank 0, one after the other, whatever rank they
/// lie on. All ranks take part: rank 0 calls next(), then all call skip_rest().
class GatheredParameters {
 public:
  /// `slices` [owned().numel] each.
  GatheredParameters(Backend& backend, Communicator& communicator, const ParameterStore& store,
                     std::vector<Tensor> slices);

  std::size_t num_slices() const { return slices_.size(); }
  /// Next parameter, [numel] of it: all of the first of `slices`, then of the second ...
  void next(std::span<float> values);
  /// Serves the other ranks until there is nothing left.
  void skip_rest();

 private:
  void gather(const Tensor& slice, int owner, const FlatRange& range, std::span<float> values);

  Backend& backend_;
  Communicator& communicator_;
  const ParameterStore& store_;
  std::vector<Tensor> slices_;
  std::size_t taken_ = 0;
  Buffer staging_buffer_;
  Tensor staging_;
};

}  // namespace bitfall
