// Properties of the adversary: what each schedule and the freezing of warps cause.
#include <algorithm>
#include <set>
#include <vector>

#include "emulator/selftests/kernels.h"

using namespace emulator;
using namespace emulator::selftest;

// The order in which 8 warps reach `steps` preemption points.
std::vector<uint32_t> order_of_warps(int steps) {
  std::vector<uint32_t> order;
  launch({.grid = 1, .block = 256}, [&] {
    for (int i = 0; i < steps; ++i) {
      if (threadIdx.x % 32 == 0) order.push_back(threadIdx.x / 32);
      preemption_point();
      __syncwarp();
    }
  });
  return order;
}

size_t changes(const std::vector<uint32_t>& order) {
  size_t count = 0;
  for (size_t i = 1; i < order.size(); ++i) count += order[i] != order[i - 1];
  return count;
}

TEST(run_ahead_runs_one_warp_to_its_end) {
  const KeepConfig keep;
  config().schedule = Schedule::RunAhead;
  config().freeze = false;
  std::set<uint32_t> first;
  for (config().seed = 1; config().seed <= 16; ++config().seed) {
    const auto order = order_of_warps(20);
    CHECK(changes(order) == 7);
    first.insert(order[0]);
  }
  CHECK(first.size() > 3);
}

TEST(random_interleaves) {
  const KeepConfig keep;
  config().schedule = Schedule::Random;
  for (config().seed = 1; config().seed <= 16; ++config().seed) {
    CHECK(changes(order_of_warps(20)) > 40);
  }
}

TEST(priority_prefers_a_warp_and_changes_seldom) {
  const KeepConfig keep;
  config().schedule = Schedule::Priority;
  config().freeze = false;
  size_t total = 0;
  for (config().seed = 1; config().seed <= 16; ++config().seed) {
    total += changes(order_of_warps(20));
  }
  CHECK(total >= 16 * 7);
  CHECK(total < 16 * 20);
}

// Two warps alternate through a barrier: a third that is frozen falls far behind.
TEST(freezing_leaves_warps_behind) {
  const KeepConfig keep;
  config().schedule = Schedule::Random;
  int max_behind[2] = {};
  for (const bool freeze : {false, true}) {
    config().freeze = freeze;
    for (config().seed = 1; config().seed <= 8; ++config().seed) {
      int steps[2] = {};
      launch({.grid = 1, .block = 256}, [&] {  // two warpgroups, each with a barrier of its own
        const uint32_t group = threadIdx.x / 128;
        for (int i = 0; i < 300; ++i) {
          bar_sync(1 + group, 128);
          if (threadIdx.x % 128 == 0) {
            ++steps[group];
            if (steps[1 - group] < 300) {
              max_behind[freeze] = std::max(max_behind[freeze], steps[group] - steps[1 - group]);
            }
          }
        }
      });
    }
  }
  CHECK(max_behind[1] > max_behind[0] + 20);
}

TEST(a_thread_that_yields_lets_every_other_run) {
  for_each_schedule(4, [] {
    volatile bool done = false;
    bool performed = false;
    launch({.grid = 2, .block = 64}, [&] {  // one lane of one block ends the wait of all the others
      if (blockIdx.x == 1 && threadIdx.x == 33) {
        for (int i = 0; i < 20; ++i) yield();
        done = true;
      }
      while (!done) yield();
      if (blockIdx.x == 0 && threadIdx.x == 0) {
        engine_push({.what = "event", .perform = [&] { performed = true; }});
        while (!performed) yield();
      }
    });
  });
}

TEST(blocks_start_together_and_apart) {
  bool together = false, apart = false;
  for_each_schedule(8, [&] {
    bool first_done = false, second_begun = false;
    launch({.grid = 2, .block = 32}, [&] {
      if (threadIdx.x != 0) return;
      second_begun |= first_done;
      for (int i = 0; i < 10; ++i) yield();
      if (!first_done && second_begun) apart = true;
      first_done = true;
    });
    (second_begun ? apart : together) = true;
  });
  CHECK(together && apart);
}
