// Warp collectives: what they return, and what divergence and wrong masks do.
#include "emulator/emulator.h"
#include "emulator/selftests/cases.h"

using namespace emulator::selftest;

using emulator::config;
using emulator::ErrorKind;
using emulator::launch;

constexpr unsigned kAll = 0xffffffffu;

template <class Kernel>
void warp(Kernel kernel) {
  launch({.grid = 1, .block = 32}, kernel);
}

TEST(shuffles) {
  bool right = true;
  const auto expect = [&](bool condition) { right &= condition; };
  for_each_schedule(4, [&] {
    warp([&] {
      const int lane = int(threadIdx.x);
      expect(__shfl_sync(kAll, lane, 5) == 5);
      expect(__shfl_sync(kAll, lane, 37) == 5);  // modulo the width
      expect(__shfl_sync(kAll, lane, 3, 8) == lane / 8 * 8 + 3);
      expect(__shfl_up_sync(kAll, lane, 4u) == (lane < 4 ? lane : lane - 4));
      expect(__shfl_down_sync(kAll, lane, 4u) == (lane > 27 ? lane : lane + 4));
      expect(__shfl_down_sync(kAll, lane, 4u, 8) == (lane % 8 > 3 ? lane : lane + 4));
      expect(__shfl_xor_sync(kAll, lane, 16) == (lane ^ 16));
      expect(__shfl_xor_sync(kAll, double(lane), 1) == double(lane ^ 1));
      expect(__ballot_sync(kAll, lane % 3 == 0) == 0x49249249u);
      expect(__any_sync(kAll, lane == 7) == 1 && __any_sync(kAll, 0) == 0);
      expect(__all_sync(kAll, 1) == 1 && __all_sync(kAll, lane != 7) == 0);
      // The halves of a warp go different ways, with masks of their own.
      const unsigned half = lane < 16 ? 0xffffu : 0xffff0000u;
      float sum = 1;
      for (int i = 8; i > 0; i /= 2) sum += __shfl_xor_sync(half, sum, i);
      expect(sum == 16);
      if (lane < 16) __syncwarp(half);
      __syncwarp();
      // Eight groups of four lanes.
      const unsigned group = 0xfu << lane / 4 * 4;
      expect(__ballot_sync(group, lane % 4 == 1) == 2u << lane / 4 * 4);
    });
  });
  that(right, "shuffles and votes, whole warps and parts, under every schedule");
}

TEST(elections) {
  unsigned elected = 0;  // over all seeds
  bool right = true;
  for_each_schedule(8, [&] {
    warp([&] {
      const unsigned first = __ballot_sync(kAll, emulator::elect_sync());
      right &= std::popcount(first) == 1;
      right &= __ballot_sync(kAll, emulator::elect_sync()) == first;
      if (threadIdx.x == 0) elected |= first;
    });
  });
  that(right, "one lane is elected, and the same one again");
  that(std::popcount(elected) > 1, "which one, is not always the same");
}

TEST(misuse) {
  const auto rejects = [](const char* name, ErrorKind kind, const char* text, void (*kernel)()) {
    fails(name, kind, text, [&] { warp(kernel); });
  };
  rejects("a lane outside of its own mask", ErrorKind::Misuse, "is not in the mask",
          [] { __syncwarp(1u); });
  rejects("elect.sync without a lane that has exited", ErrorKind::Misuse, "have exited", [] {
    if (threadIdx.x == 3) return;
    for (int i = 0; i < 40; ++i) __syncwarp(~8u);
    (void)emulator::elect_sync();
  });
  rejects("elect.sync beside another collective", ErrorKind::Misuse, "divergent warp",
          [] { threadIdx.x < 4 ? void(emulator::elect_sync()) : __syncwarp(); });
  rejects("a mask with lanes that have exited", ErrorKind::Misuse, "have exited", [] {
    if (threadIdx.x == 3) return;
    for (int i = 0; i < 40; ++i) __syncwarp(~8u);
    __syncwarp();
  });
  rejects("a lane exits while others wait for it", ErrorKind::ExitCheck, "wait for it at", [] {
    if (threadIdx.x == 3) {
      for (int i = 0; i < 100; ++i) emulator::yield();
      return;
    }
    __syncwarp();
  });
  rejects("lanes at different collectives", ErrorKind::Misuse, "divergent warp", [] {
    if (threadIdx.x < 16)
      __ballot_sync(kAll, 1);
    else
      __syncwarp();
  });
  rejects("lanes at the same collective with other immediates", ErrorKind::Misuse,
          "immediate operands", [] { __shfl_sync(kAll, 1, 0, threadIdx.x < 16 ? 8 : 16); });
  rejects("two groups that wait for each other", ErrorKind::Misuse, "divergent warp", [] {
    if (threadIdx.x < 16)
      __syncwarp(0x1ffffu);
    else
      __syncwarp(0xffff8000u);
  });
  rejects("a group that waits for a lane of another", ErrorKind::ExitCheck, "wait for it at", [] {
    if (threadIdx.x < 16)
      __syncwarp(0x1ffffu);
    else
      __syncwarp(0xffff0000u);
  });
  rejects("a shuffle from a lane outside of the mask", ErrorKind::Misuse, "not in the mask", [] {
    if (threadIdx.x < 8) __shfl_sync(0xffu, 1, 9);
  });
  rejects("a barrier that half of the warp does not reach", ErrorKind::Misuse, "divergent warp",
          [] {
            if (threadIdx.x < 16)
              __syncthreads();
            else
              __syncwarp();
          });
  rejects("a shuffle width of 5", ErrorKind::Misuse, "power of two",
          [] { __shfl_sync(kAll, 1, 0, 5); });
}

// Between two collectives lanes are independent: something that needs __syncwarp goes wrong without
// it.
TEST(lanes_are_not_in_lockstep) {
  const KeepConfig keep;
  bool differs = false;
  for (uint64_t seed = 1; seed < 9; ++seed) {
    config().seed = seed;
    int shared_value[32] = {};
    warp([&] {
      const unsigned lane = threadIdx.x;
      __ballot_sync(kAll, 1);
      shared_value[lane] = 1;
      differs |= shared_value[(lane + 1) % 32] != 1;
    });
  }
  that(differs, "lanes of a warp do not run in lockstep");
}
