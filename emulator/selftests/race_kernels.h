// What the race checker's self-tests share. A kernel is a lambda that asks missing("edge") at each
// edge that may be left out; the right form runs under every schedule and many seeds without an
// alarm, and each form with one edge missing is diagnosed in every run.
#pragma once

#include "emulator/selftests/kernels.h"

namespace emulator::selftest {

inline std::string missing_edge;  // "": the right form
inline bool missing(const char* edge) { return missing_edge == edge; }

inline LaunchConfig race_launch(uint32_t blocks, uint32_t threads, uint32_t shared_bytes = 1024,
                                uint32_t cluster = 1) {
  return {.grid = blocks, .block = threads, .cluster = cluster, .shared_bytes = shared_bytes};
}

// Calls `body` without the edge, under every schedule.
inline void for_each_schedule_without(const char* edge, const std::function<void()>& body,
                                      uint64_t seeds = 4) {
  missing_edge = edge;
  for_each_schedule(seeds, body);
  missing_edge.clear();
}

inline void expect_clean(const std::function<void()>& body, uint64_t seeds = 24) {
  for_each_schedule_without("", body, seeds);
}

inline void expect_fault(const char* edge, ErrorKind kind, const char* text,
                         const std::function<void()>& body) {
  for_each_schedule_without(edge, [&] { fails(std::string("without ") + edge, kind, text, body); });
}

// A race, or, where the first write of the memory is concerned, a read of what nothing has written
// yet.
inline void expect_diagnosis(const char* edge, const std::function<void()>& body) {
  for_each_schedule_without(edge, [&] {
    try {
      body();
    } catch (const Error& error) {
      if (error.kind == ErrorKind::Race || error.kind == ErrorKind::Uninitialised) return;
      throw Failure(format("without \"%s\": expected a race, came %s", edge, error.what()));
    }
    throw Failure(format("without \"%s\": expected a race, came no error", edge));
  });
}

inline void expect_race(const char* edge, const char* text, const std::function<void()>& body) {
  expect_fault(edge, ErrorKind::Race, text, body);
}

}  // namespace emulator::selftest
