// The path of a model's layers, and whether a config speaks of the same.
#pragma once

#include <string>
#include <vector>

#include "core/parameter_store.h"
#include "eigen_sched/eigenvalue_config.h"

namespace bitfall {

/// What the names of block parameters begin with: "bert.encoder.layer"; "" without blocks.
std::string layer_path(const std::vector<Parameter>& parameters);

/// Throws ConfigError unless layer_name and layer_num of an enabled config are those of the model.
void check_layers(const EigenvalueConfig& config, const std::string& model_path, int num_blocks);

}  // namespace bitfall
