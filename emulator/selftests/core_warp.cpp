// Warp collectives: what they return, and what divergence and wrong masks do.
#include "emulator/selftests/kernels.h"

using namespace emulator;
using namespace emulator::selftest;

constexpr unsigned kAll = 0xffffffffu;

template <class Kernel>
void warp(Kernel kernel) {
  launch({.grid = 1, .block = 32}, kernel);
}

TEST(shuffles) {
  for_each_schedule(4, [&] {
    warp([&] {
      const int lane = int(threadIdx.x);
      CHECK(__shfl_sync(kAll, lane, 5) == 5);
      CHECK(__shfl_sync(kAll, lane, 37) == 5);  // modulo the width
      CHECK(__shfl_sync(kAll, lane, 3, 8) == lane / 8 * 8 + 3);
      CHECK(__shfl_up_sync(kAll, lane, 4u) == (lane < 4 ? lane : lane - 4));
      CHECK(__shfl_down_sync(kAll, lane, 4u) == (lane > 27 ? lane : lane + 4));
      CHECK(__shfl_down_sync(kAll, lane, 4u, 8) == (lane % 8 > 3 ? lane : lane + 4));
      CHECK(__shfl_xor_sync(kAll, lane, 16) == (lane ^ 16));
      CHECK(__shfl_xor_sync(kAll, double(lane), 1) == double(lane ^ 1));
      CHECK(__ballot_sync(kAll, lane % 3 == 0) == 0x49249249u);
      CHECK(__any_sync(kAll, lane == 7) == 1 && __any_sync(kAll, 0) == 0);
      CHECK(__all_sync(kAll, 1) == 1 && __all_sync(kAll, lane != 7) == 0);
      // The halves of a warp diverge, each with its own mask.
      const unsigned half = lane < 16 ? 0xffffu : 0xffff0000u;
      float sum = 1;
      for (int i = 8; i > 0; i /= 2) sum += __shfl_xor_sync(half, sum, i);
      CHECK(sum == 16);
      if (lane < 16) __syncwarp(half);
      __syncwarp();
      // Eight groups of four lanes.
      const unsigned group = 0xfu << lane / 4 * 4;
      CHECK(__ballot_sync(group, lane % 4 == 1) == 2u << lane / 4 * 4);
    });
  });
}

TEST(elections) {
  unsigned elected = 0;  // over all seeds
  for_each_schedule(8, [&] {
    warp([&] {
      const unsigned first = __ballot_sync(kAll, elect_sync());
      CHECK(std::popcount(first) == 1);
      CHECK(__ballot_sync(kAll, elect_sync()) == first);
      if (threadIdx.x == 0) elected |= first;
    });
  });
  CHECK(std::popcount(elected) > 1);  // which one, is not always the same
}

TEST(misuse) {
  const auto rejects = rejecting({.grid = 1, .block = 32});
  rejects("a lane outside of its own mask", kMisuse, "is not in the mask", [] { __syncwarp(1u); });
  rejects("elect.sync without a lane that has exited", kMisuse, "have exited", [] {
    if (threadIdx.x == 3) return;
    for (int i = 0; i < 40; ++i) __syncwarp(~8u);
    (void)elect_sync();
  });
  rejects("elect.sync beside another collective", kMisuse, "divergent warp",
          [] { threadIdx.x < 4 ? void(elect_sync()) : __syncwarp(); });
  rejects("a mask with lanes that have exited", kMisuse, "have exited", [] {
    if (threadIdx.x == 3) return;
    for (int i = 0; i < 40; ++i) __syncwarp(~8u);
    __syncwarp();
  });
  rejects("a lane exits while others wait for it", ErrorKind::ExitCheck, "wait for it at", [] {
    if (threadIdx.x == 3) {
      for (int i = 0; i < 100; ++i) yield();
      return;
    }
    __syncwarp();
  });
  rejects("lanes at different collectives", kMisuse, "divergent warp",
          [] { threadIdx.x < 16 ? void(__ballot_sync(kAll, 1)) : __syncwarp(); });
  rejects("lanes at the same collective with other immediates", kMisuse, "immediate operands",
          [] { __shfl_sync(kAll, 1, 0, threadIdx.x < 16 ? 8 : 16); });
  rejects("two groups that wait for each other", kMisuse, "divergent warp",
          [] { __syncwarp(threadIdx.x < 16 ? 0x1ffffu : 0xffff8000u); });
  rejects("a group that waits for a lane of another", ErrorKind::ExitCheck, "wait for it at",
          [] { __syncwarp(threadIdx.x < 16 ? 0x1ffffu : 0xffff0000u); });
  rejects("a shuffle from a lane outside of the mask", kMisuse, "not in the mask", [] {
    if (threadIdx.x < 8) __shfl_sync(0xffu, 1, 9);
  });
  rejects("a barrier that half of the warp does not reach", kMisuse, "divergent warp",
          [] { threadIdx.x < 16 ? __syncthreads() : __syncwarp(); });
  rejects("a shuffle width of 5", kMisuse, "power of two", [] { __shfl_sync(kAll, 1, 0, 5); });
}

// Between two collectives lanes are independent: something that needs __syncwarp goes wrong without
// it.
TEST(lanes_are_not_in_lockstep) {
  const KeepConfig keep;
  bool differs = false;
  for (config().seed = 1; config().seed < 9; ++config().seed) {
    int shared_value[32] = {};
    warp([&] {
      const unsigned lane = threadIdx.x;
      __ballot_sync(kAll, 1);
      shared_value[lane] = 1;
      differs |= shared_value[(lane + 1) % 32] != 1;
    });
  }
  CHECK(differs);
}
