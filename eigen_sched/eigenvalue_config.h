// The part of the training config that says when and how eigenvalues are computed.
#pragma once

#include <cstdint>
#include <string>

namespace bitfall {

struct EigenvalueConfig {
  bool enabled = false;
  bool verbose = false;
  int max_iter = 100;
  double tol = 1e-2;
  double stability = 1e-6;
  std::int64_t gas_boundary_resolution = 1;
  std::string layer_name = "bert.encoder.layer";  ///< checked against the model
  int layer_num = 0;                              ///< 0: the model's number of blocks
};

}  // namespace bitfall
