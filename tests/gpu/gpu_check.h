// What the modes of gpu_check share: results as lines of JSON, and engines on random weights and
// batches.
#pragma once

#include <memory>
#include <string>

#include "engine/encoder.h"
#include "engine/engine.h"

namespace bitfall::gpu_check {

/// A value that must not exceed its limit (or, with Limit::at_least, fall below it).
enum class Limit { at_most, at_least, none };

/// Prints one line of JSON, and remembers whether the value keeps to its limit.
void report(const std::string& name, double value, Limit kind, double limit,
            const std::string& unit);
/// Whether all that were reported did.
bool all_passed();

/// For make(): MoQ from 10 to 8 bits.
extern const std::string kMoq;

EncoderConfig bert(std::int64_t layers, std::int64_t hidden, std::int64_t heads,
                   std::int64_t vocab_size);
/// An engine with the same weights on every device. `precision` is "", "bf16" or "fp16"; `more`
/// goes into the config.
std::unique_ptr<Engine> make(const EncoderConfig& model, const std::string& precision,
                             const std::string& more, const std::string& device,
                             Communicator& communicator);
/// Samples [first, first + count) of the batch of `step`, with lengths in [shortest, longest].
Batch random_batch(int step, int first, int count, int shortest, int longest, int vocab_size);

/// Pieces of a step that are recorded and repeated.
void records();
/// All benchmarks.
void speed();

}  // namespace bitfall::gpu_check
