// Many ranges in one launch: which of them a piece of work belongs to.
#pragma once

#include <cstdint>

namespace bitfall {

/// The last of `count` entries whose member `first` is not behind `piece`; they rise.
template <auto first, typename Entry>
__device__ inline const Entry& entry_of(const Entry* entries, int count, std::int64_t piece) {
  int low = 0, high = count - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (entries[middle].*first <= piece) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return entries[low];
}

}  // namespace bitfall
