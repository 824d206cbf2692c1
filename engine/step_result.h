// What one training step tells its caller.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "eigen_sched/bit_schedule.h"

namespace bitfall {

struct EigenvalueResult {
  std::string name;
  int block = 0;
  int iterations = 0;  ///< of power iteration
  int products = 0;    ///< Hessian-vector products that they took
  bool converged = false;
  double value = 0;       ///< largest |eigenvalue|
  double normalized = 0;  ///< ev in [0, 1]
  int factor = 1;         ///< 1 + floor(4 ev)
};

struct StepResult {
  std::int64_t step = 0;
  double loss = 0;  ///< mean over the global batch
  double grad_norm = 0;
  double learning_rate = 0;
  double loss_scale = 1;
  bool skipped = false;
  std::vector<int> bits;  ///< per state of the schedule
  std::vector<BitDrop> drops;
  std::vector<EigenvalueResult> eigenvalues;
};

}  // namespace bitfall
