// Ends a launch that takes too much processor time, even one whose thread spins without ever
// calling the layer.
#pragma once

namespace emulator {

/// Armed while it exists. Sets Machine::time_is_over, and tears a thread that spins out of its
/// loop.
class Watchdog {
 public:
  explicit Watchdog(double seconds);
  ~Watchdog();
  Watchdog(const Watchdog&) = delete;
  Watchdog& operator=(const Watchdog&) = delete;
};

/// Called by the scheduler when Machine::time_is_over.
[[noreturn]] void watchdog_report();

}  // namespace emulator
