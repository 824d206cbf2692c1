// state.json of a checkpoint: text to TrainingState and back. Private to the checkpoint.
#pragma once

#include <string>

#include "engine/checkpoint.h"

namespace bitfall {

std::string to_json_text(const TrainingState& state);

/// Throws CheckpointError that names `source` and the key.
TrainingState parse_training_state(const std::string& text, const std::string& source);

/// Throws CheckpointError that lists the keys in which two completed configs differ, except those
/// that change neither weights nor schedules.
void check_same_config(const std::string& saved, const std::string& current,
                       const std::string& source);

}  // namespace bitfall
