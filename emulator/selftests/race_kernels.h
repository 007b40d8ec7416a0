// What the race checker's self-tests share. A kernel is a lambda that asks missing("edge") at each
// edge that may be left out; the right form runs under every schedule and many seeds without an
// alarm, and each form with one edge missing is diagnosed in every run.
#pragma once

#include <functional>
#include <string>

#include "emulator/emulator.h"
#include "emulator/selftests/selftest.h"

namespace emulator::selftest {

inline std::string missing_edge;  // "": the right form
inline bool missing(const char* edge) { return missing_edge == edge; }

inline LaunchConfig race_launch(uint32_t blocks, uint32_t threads, uint32_t shared_bytes = 1024,
                                uint32_t cluster = 1) {
  LaunchConfig launch_config;
  launch_config.grid = dim3(blocks, 1, 1);
  launch_config.block = dim3(threads, 1, 1);
  launch_config.cluster = dim3(cluster, 1, 1);
  launch_config.shared_bytes = shared_bytes;
  return launch_config;
}

// Runs `body` under all schedules and completions.
inline void for_all_modes(uint64_t seeds, const std::function<void()>& body) {
  for (Schedule schedule : {Schedule::RunAhead, Schedule::Random, Schedule::Priority})
    for (Completion completion : {Completion::Early, Completion::Late, Completion::Random})
      for (uint64_t seed = 1; seed <= seeds; ++seed) {
        config() = Config{};
        config().seed = seed;
        config().schedule = schedule;
        config().completion = completion;
        config().watchdog_seconds = 20;
        body();
      }
}

inline void expect_clean(const std::function<void()>& body, uint64_t seeds = 24) {
  missing_edge.clear();
  for_all_modes(seeds, body);
}

inline void expect_fault(const char* edge, ErrorKind kind, const char* text,
                         const std::function<void()>& body) {
  missing_edge = edge;
  for_all_modes(4, [&] { CHECK_FAILS(kind, text, body()); });
  missing_edge.clear();
}

// A race, or, where the first write of the memory is concerned, a read of what nothing has written
// yet.
inline void expect_diagnosis(const char* edge, const std::function<void()>& body) {
  missing_edge = edge;
  for_all_modes(4, [&] {
    try {
      body();
    } catch (const Error& error) {
      if (error.kind == ErrorKind::Race || error.kind == ErrorKind::Uninitialised) return;
      throw Failure(format("without \"%s\": expected a race, came %s", edge, error.what()));
    }
    throw Failure(format("without \"%s\": expected a race, came no error", edge));
  });
  missing_edge.clear();
}

inline void expect_race(const char* edge, const char* text, const std::function<void()>& body) {
  expect_fault(edge, ErrorKind::Race, text, body);
}

template <class T>
T* shared_array(uint32_t offset = 0) {
  return reinterpret_cast<T*>(dynamic_shared_memory() + offset);
}

}  // namespace emulator::selftest
