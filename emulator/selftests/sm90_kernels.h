// What the self-tests of the sm_90 units share: kernels as lambdas, run under every schedule.
#pragma once

#include <functional>

#include "emulator/copies/mbarrier.h"
#include "emulator/copies/tma.h"
#include "emulator/machine/launch.h"
#include "emulator/machine/scheduler.h"
#include "emulator/memory/global_memory.h"
#include "emulator/memory/memory.h"
#include "emulator/memory/shared_memory.h"
#include "emulator/selftests/selftest.h"
#include "emulator/threads/barriers.h"
#include "emulator/threads/cluster.h"

namespace emulator::selftest {

constexpr Schedule kSchedules[] = {Schedule::RunAhead, Schedule::Random, Schedule::Priority};
constexpr Completion kCompletions[] = {Completion::Early, Completion::Late, Completion::Random};

inline LaunchConfig blocks_of(uint32_t threads, uint32_t shared_bytes, uint32_t blocks = 1) {
  LaunchConfig launch_config;
  launch_config.grid = dim3(blocks, 1, 1);
  launch_config.block = dim3(threads, 1, 1);
  launch_config.cluster = dim3(blocks, 1, 1);
  launch_config.shared_bytes = shared_bytes;
  return launch_config;
}

inline void run(const LaunchConfig& launch_config, const std::function<void()>& kernel,
                uint64_t seed = 1, Schedule schedule = Schedule::Random,
                Completion completion = Completion::Late) {
  config() = Config{};
  config().seed = seed;
  config().schedule = schedule;
  config().completion = completion;
  config().watchdog_seconds = 20;
  launch(launch_config, kernel);
}

// `check` runs on the host after each launch.
inline void run_everywhere(
    const LaunchConfig& launch_config, const std::function<void()>& kernel,
    const std::function<void()>& check = [] {}, uint64_t seeds = 3) {
  for (Schedule schedule : kSchedules) {
    for (Completion completion : kCompletions) {
      for (uint64_t seed = 1; seed <= seeds; ++seed) {
        run(launch_config, kernel, seed, schedule, completion);
        check();
      }
    }
  }
}

inline uint32_t thread_index() { return current_thread().linear; }

// Waits, without synchronising, until the block of that rank has exited.
inline void wait_until_exited(uint32_t rank) {
  const Block& peer = *current_thread().block().cluster->blocks[rank];
  while (peer.state != BlockState::Exited) yield();
}

// Initialises mbarriers at `first`, `first` + 8, ... and makes them known to the block.
inline void init_mbarriers(uint32_t first, std::initializer_list<uint32_t> counts) {
  if (thread_index() == 0) {
    for (uint32_t count : counts) {
      mbarrier_init(first, count);
      first += 8;
    }
    fence_mbarrier_init();
  }
  syncthreads();
}

}  // namespace emulator::selftest
