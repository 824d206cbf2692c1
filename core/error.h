// Exception types and the two helpers that build their messages.
//
// A message says where, what was seen, what was expected and what to do:
// "quantize_training.quantize_bits.target_bits = 0: expected 1..16; 8 gives int8 weights".
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace bitfall {

/// Base of every error that bitfall throws on purpose.
class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// A training config, a flag or a combination of them is wrong.
class ConfigError : public Error {
 public:
  using Error::Error;
};

/// Tensor shapes or dtypes do not fit together.
class ShapeError : public Error {
 public:
  using Error::Error;
};

/// A device cannot run an operation with this size or dtype.
class UnsupportedError : public Error {
 public:
  using Error::Error;
};

/// A library or device call failed.
class BackendError : public Error {
 public:
  using Error::Error;
};

/// Ranks disagree, or MPI failed.
class CommunicationError : public Error {
 public:
  using Error::Error;
};

/// A model file is missing, cut short, hostile or does not fit the model.
class ModelFileError : public Error {
 public:
  using Error::Error;
};

/// A checkpoint is damaged or belongs to another run.
class CheckpointError : public Error {
 public:
  using Error::Error;
};

/// Training went wrong in a way that no retry mends (for example a NaN loss without a loss scaler).
class TrainingError : public Error {
 public:
  using Error::Error;
};

/// Streams all parts into one string.
template <typename... Parts>
std::string concat(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  return text.str();
}

/// Throws ErrorType with the concatenated parts unless `condition` holds. The parts are only
/// formatted on failure, but they are evaluated always: keep them cheap.
template <typename ErrorType, typename... Parts>
void check(bool condition, const Parts&... parts) {
  if (!condition) throw ErrorType(concat(parts...));
}

}  // namespace bitfall
