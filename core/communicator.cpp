#include "core/communicator.h"

#include <algorithm>
#include <cstring>

#include "core/error.h"

namespace bitfall {

std::vector<double> sum_over_ranks(Communicator& communicator, std::vector<double> values) {
  const std::size_t bytes = values.size() * sizeof(double);
  std::vector<std::byte> mine(bytes);
  if (bytes > 0) std::memcpy(mine.data(), values.data(), bytes);
  std::fill(values.begin(), values.end(), 0.0);
  for (const std::vector<std::byte>& other : communicator.all_gather(mine)) {
    check<CommunicationError>(other.size() == bytes, "sum_over_ranks: ", other.size(),
                              " bytes from a rank, expected ", bytes);
    for (std::size_t i = 0; i < values.size(); ++i) {
      double value = 0;
      std::memcpy(&value, other.data() + i * sizeof(double), sizeof(double));
      values[i] += value;
    }
  }
  return values;
}

}  // namespace bitfall
