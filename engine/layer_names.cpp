#include "engine/layer_names.h"

#include "core/error.h"

namespace bitfall {

std::string layer_path(const std::vector<Parameter>& parameters) {
  for (const Parameter& parameter : parameters) {
    if (parameter.block == 0) return parameter.name.substr(0, parameter.name.find(".0."));
  }
  return "";
}

void check_layers(const EigenvalueConfig& config, const std::string& model_path, int num_blocks) {
  if (!config.enabled) return;
  check<ConfigError>(config.layer_name == model_path, "eigenvalue.layer_name = \"",
                     config.layer_name, "\": the model's layers are \"", model_path, "\"");
  check<ConfigError>(config.layer_num == 0 || config.layer_num == num_blocks,
                     "eigenvalue.layer_num = ", config.layer_num, ": the model has ", num_blocks,
                     " layers; write ", num_blocks, " or leave the key out");
}

}  // namespace bitfall
