// PhaseTimer: how long each phase of a step takes.
#pragma once

#include <chrono>
#include <map>
#include <string>
#include <utility>

namespace bitfall {

class PhaseTimer {
 public:
  /// Runs `function` and adds its time to `phase`.
  template <typename Function>
  decltype(auto) measure(const char* phase, Function&& function) {
    const Span span(seconds_[phase]);
    return std::forward<Function>(function)();
  }

  /// Seconds by phase since the last call.
  std::map<std::string, double> take() { return std::exchange(seconds_, {}); }

 private:
  /// Adds its own lifetime to `seconds`.
  class Span {
   public:
    explicit Span(double& seconds) : seconds_(seconds) {}
    ~Span() { seconds_ += std::chrono::duration<double>(Clock::now() - begin_).count(); }
    Span(const Span&) = delete;
    Span& operator=(const Span&) = delete;

   private:
    using Clock = std::chrono::steady_clock;
    double& seconds_;
    Clock::time_point begin_ = Clock::now();
  };

  std::map<std::string, double> seconds_;
};

}  // namespace bitfall
