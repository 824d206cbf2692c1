// Recorder: repeats a piece of a step whose operations are the same again.
//
// A small model on a fast device waits for its operations to be started one by one. A device may
// therefore start a piece as a whole, if only what its tensors hold has changed.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

namespace bitfall {

/// All that the operations of a piece depend on beside what their tensors hold: addresses, sizes
/// and numbers, or what these follow from.
using RecordKey = std::vector<std::uint64_t>;

/// As it is for devices that record nothing.
class Recorder {
 public:
  virtual ~Recorder() = default;

  /// Sizes that vary are best rounded up to a multiple of this, so that keys come again.
  virtual std::int64_t size_multiple() const { return 1; }
  /// Does what `work` does: operations of one backend in device memory. It may do so without a call
  /// of `work`, by repeating what that did under an equal key; so `work` must change nothing on the
  /// host that others read.
  virtual void run(const RecordKey& /*key*/, const std::function<void()>& work) { work(); }
};

}  // namespace bitfall
