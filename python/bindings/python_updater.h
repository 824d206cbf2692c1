// The class bitfall._core.Updater: an Updater with its backend, for a model that Python runs
// forward and backward.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "engine/updater.h"
#include "python/bindings/device.h"

namespace bitfall::python {

/// (name, shape, block, whether it lies right behind its predecessor)
using PythonSpec = std::tuple<std::string, std::vector<std::int64_t>, int, bool>;
/// Dicts {"lr", "weight_decay", "betas", "eps", "parameters"}, or nothing: the caller updates.
using PythonGroups = std::optional<std::vector<pybind11::dict>>;

class PythonUpdater {
 public:
  /// `block_names` replace those that the engine would make of layer path and number.
  PythonUpdater(const std::vector<PythonSpec>& specs, const CompletedConfig& config,
                Communicator& communicator, const PythonGroups& groups,
                std::vector<std::string> block_names, const PythonDevice& device,
                const pybind11::function& fill);

  Updater& updater() { return updater_; }
  int device_index() const { return device_index_; }
  Tensor loss() const { return loss_buffer_.view(DType::f32, Shape{1}); }

  pybind11::dict step(const std::vector<pybind11::dict>& groups,
                      const pybind11::object& make_hessian, const pybind11::object& update_masters);
  /// Zeros the gradient of parameter `index`, of which zeros need no memory.
  void zero_gradient(std::size_t index) {
    backend_->fill_zero(updater_.gradient_views().at(index));
  }
  /// States and steps of each width under factor 1, and 5 for blocks if eigenvalues decide.
  pybind11::list plan() const;

 private:
  /// States with the names of this object's blocks.
  std::vector<BitStateSpec> states() const;

  std::unique_ptr<Backend> backend_;
  int device_index_;
  std::vector<std::string> block_names_;
  Buffer loss_buffer_;
  Updater updater_;
};

/// Adds save_checkpoint, load_checkpoint and the module's read_client_checkpoint.
void bind_checkpoint(pybind11::module_& module,
                     pybind11::class_<PythonUpdater, std::shared_ptr<PythonUpdater>>& updater);

}  // namespace bitfall::python
