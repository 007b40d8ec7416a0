// Cases with a sentence for a name, for tests with many of them (selftest.h has the tests
// themselves), and sweeps of schedules.
#pragma once
#include <functional>
#include <string>

#include "emulator/machine/config.h"
#include "emulator/selftests/selftest.h"

namespace emulator::selftest {

inline void that(bool condition, const std::string& name) {
  if (!condition) throw Failure("does not hold: " + name);
}

/// `body` must fail with that kind, and with `text` in the message.
inline void fails(const std::string& name, ErrorKind kind, const std::string& text,
                  const std::function<void()>& body) {
  try {
    body();
  } catch (const Error& error) {
    if (error.kind == kind && std::string(error.what()).find(text) != std::string::npos) return;
    throw Failure(name + ": expected " + name_of(kind) + " \"" + text + "\", came " + error.what());
  }
  throw Failure(name + ": expected " + name_of(kind) + " \"" + text + "\", came no error");
}

inline void passes(const std::string& name, const std::function<void()>& body) {
  try {
    body();
  } catch (const Error& error) {
    throw Failure(name + ": expected no error, came " + error.what());
  }
}

/// Whether `body` either returns false or fails: a race build diagnoses what others see as a wrong
/// result.
inline bool goes_wrong(const std::function<bool()>& body) {
  try {
    return !body();
  } catch (const Error&) {
    return true;
  }
}

/// Restores the configuration.
struct KeepConfig {
  Config before = config();
  ~KeepConfig() { config() = before; }
};

/// Calls `body` under every schedule and completion, with `seeds` seeds each.
inline void for_each_schedule(int seeds, const std::function<void()>& body) {
  const KeepConfig keep;
  for (const auto schedule : {Schedule::RunAhead, Schedule::Random, Schedule::Priority}) {
    for (const auto completion : {Completion::Early, Completion::Late, Completion::Random}) {
      for (int seed = 1; seed <= seeds; ++seed) {
        config().schedule = schedule;
        config().completion = completion;
        config().seed = static_cast<uint64_t>(seed);
        body();
      }
    }
  }
}

}  // namespace emulator::selftest
