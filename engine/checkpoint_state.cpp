#include "engine/checkpoint_state.h"

#include <algorithm>
#include <map>
#include <nlohmann/json.hpp>
#include <string_view>

#include "core/error.h"

namespace bitfall {

using nlohmann::json;

namespace {

constexpr int kFormatVersion = 1;

/// Flattened keys ("/optimizer/params/lr") below these prefixes may differ between runs: they
/// print, they say by what the same is computed and into which pieces it is cut, or how long the
/// run is, which a resumed one may change.
constexpr std::string_view kMayDiffer[] = {
    "/steps_per_print",
    "/wall_clock_breakdown",
    "/bitfall/",
    "/tensorboard/",
    "/quantize_training/quantize_verbose",
    "/quantize_training/eigenvalue/verbose",
    "/eigenvalue/verbose",
    "/train_micro_batch_size_per_gpu",
    "/gradient_accumulation_steps",
    "/zero_optimization",
    "/scheduler/params/num_training_steps",
    "/scheduler/params/total_num_steps",
};

bool may_differ(std::string_view key) {
  return std::any_of(std::begin(kMayDiffer), std::end(kMayDiffer),
                     [key](std::string_view prefix) { return key.starts_with(prefix); });
}

json to_json(const BitScheduleState& schedule) {
  json states = json::array();
  for (const BitState& state : schedule.states) {
    states.push_back({{"bits", state.bits},
                      {"period", state.period},
                      {"factor", state.factor},
                      {"mix", state.mix}});
  }
  return {{"ticks", schedule.ticks}, {"started", schedule.started}, {"states", states}};
}

BitScheduleState to_bit_schedule(const json& value) {
  BitScheduleState schedule;
  schedule.ticks = value.at("ticks").get<std::int64_t>();
  schedule.started = value.at("started").get<bool>();
  for (const json& state : value.at("states")) {
    schedule.states.push_back({state.at("bits").get<int>(), state.at("period").get<double>(),
                               state.at("factor").get<int>(), state.at("mix").get<double>()});
  }
  return schedule;
}

}  // namespace

std::string to_json_text(const TrainingState& state) {
  const json document = {
      {"version", kFormatVersion},
      {"global_step", state.global_step},
      {"skipped_steps", state.skipped_steps},
      {"boundaries", state.boundaries},
      {"optimizer_steps", state.optimizer_steps},
      {"loss_scaler",
       {{"scale", state.loss_scaler.scale},
        {"iteration", state.loss_scaler.iteration},
        {"last_overflow_iteration", state.loss_scaler.last_overflow_iteration},
        {"hysteresis", state.loss_scaler.hysteresis}}},
      {"bit_schedule", to_json(state.bit_schedule)},
      {"config", json::parse(state.config)},
      {"client_state", state.client_state},
  };
  return document.dump(2, ' ', false, json::error_handler_t::replace) + "\n";
}

TrainingState parse_training_state(const std::string& text, const std::string& source) {
  try {
    const json document = json::parse(text);
    const int version = document.at("version").get<int>();
    check<CheckpointError>(version == kFormatVersion, source, ": version ", version,
                           " of the format, this program reads ", kFormatVersion);
    TrainingState state;
    state.global_step = document.at("global_step").get<std::int64_t>();
    state.skipped_steps = document.at("skipped_steps").get<std::int64_t>();
    state.boundaries = document.at("boundaries").get<std::int64_t>();
    state.optimizer_steps = document.at("optimizer_steps").get<std::int64_t>();
    check<CheckpointError>(state.global_step >= 0 && state.skipped_steps >= 0 &&
                               state.boundaries >= 0 && state.optimizer_steps >= 0,
                           source, ": a negative counter");
    const json& scaler = document.at("loss_scaler");
    state.loss_scaler = {scaler.at("scale").get<double>(),
                         scaler.at("iteration").get<std::int64_t>(),
                         scaler.at("last_overflow_iteration").get<std::int64_t>(),
                         scaler.at("hysteresis").get<int>()};
    state.bit_schedule = to_bit_schedule(document.at("bit_schedule"));
    state.config = document.at("config").dump();
    state.client_state = document.at("client_state").get<std::string>();
    return state;
  } catch (const json::exception& error) {
    throw CheckpointError(concat(source, ": not the state of a checkpoint (", error.what(), ")"));
  }
}

void check_same_config(const std::string& saved, const std::string& current,
                       const std::string& source) {
  const json then = json::parse(saved).flatten();
  const json now = json::parse(current).flatten();
  std::map<std::string, std::string> differences;
  const auto compare = [&](const json& from, const json& other) {
    for (const auto& [key, value] : from.items()) {
      if (may_differ(key) || (other.contains(key) && other.at(key) == value)) continue;
      const auto text = [&key](const json& side) {
        return side.contains(key) ? side.at(key).dump() : std::string("absent");
      };
      differences[key] = concat(text(then), " then, ", text(now), " now");
    }
  };
  compare(then, now);
  compare(now, then);
  if (differences.empty()) return;
  std::string list;
  for (const auto& [key, text] : differences) {
    std::string dotted = key.substr(1);
    std::replace(dotted.begin(), dotted.end(), '/', '.');
    list += concat("\n  ", dotted, ": ", text);
  }
  throw CheckpointError(concat(source, ": written by a run with another config:", list,
                               "\nresume with the same config and flags, or train anew"));
}

}  // namespace bitfall
