// wgmma groups, fences and accumulators in flight, used rightly and wrongly. Operands are ones, so
// that an accumulator counts the k of what has executed.
#include <cmath>

#include "emulator/counts/counters.h"
#include "emulator/selftests/kernels.h"
#include "emulator/selftests/sm90_descriptor.h"

namespace {

using namespace emulator;
using namespace emulator::selftest;

constexpr uint32_t kThreads = 128;
constexpr WgmmaShape kShape{Format::kBFloat16, 16, Major::kK, Major::kK};
constexpr uint32_t kShared = 4096 + 1024;  // a, then b of 512 bytes, then an mbarrier
const uint64_t kA = descriptor_bits(0, 16, 256, Swizzle::k32);
const uint64_t kB = descriptor_bits(4096, 16, 256, Swizzle::k32);

void fill_with_ones() {
  auto* shared = shared_array<uint16_t>();
  const uint32_t threads = current_thread().block().thread_count;
  for (uint32_t i = threadIdx.x; i < 4608 / 2; i += threads) shared[i] = 0x3F80;
  fence_proxy_async_shared();
  syncthreads();
}

// Called by one warp.
void fill_b(uint16_t value) {
  for (uint32_t i = threadIdx.x % 32; i < 256; i += 32) shared_array<uint16_t>(4096)[i] = value;
}

// Runs `body(d)` in each thread of a warpgroup.
void run_warpgroup(const std::function<void(float*)>& body, uint32_t threads = kThreads) {
  launch(blocks_of(threads, kShared), [&] {
    fill_with_ones();
    float d[8] = {};
    body(d);
  });
}

void multiply(float* d) { wgmma_ss(kShape, d, kA, kB, true); }
void multiply_in_a_group(float* d) {
  wgmma_fence();
  multiply(d);
  wgmma_commit_group();
}

TEST(groups_complete_in_order) {
  for_each_schedule(5, [] {
    run_warpgroup([](float* d) {
      float e[8] = {}, f[8] = {};
      wgmma_fence();
      multiply(d);
      multiply(d);
      wgmma_commit_group();
      multiply_in_a_group(e);
      wgmma_commit_group();  // an empty group
      multiply_in_a_group(f);
      wgmma_wait_group(3);
      CHECK(d[0] == 32 && d[7] == 32);
      wgmma_wait_group(2);
      CHECK(e[3] == 16);
      multiply_in_a_group(d);
      wgmma_wait_group(0);
      CHECK(d[5] == 48 && f[0] == 16);
    });
  });
}

TEST(operations_are_counted) {
  reset_counters();
  run_warpgroup([](float* d) {
    wgmma_fence();
    multiply(d);
    multiply(d);
    wgmma_commit_group();
    wgmma_wait_group(0);
  });
  CHECK(counters().wgmma_flop == 2 * (2 * 64 * 16 * 16));
}

// One thread may release a stage for its warpgroup: a wait covers the parts of all four warps.
TEST(wait_covers_the_shares_of_the_other_warps) {
  run_everywhere(blocks_of(kThreads + 32, kShared), [] {
    if (threadIdx.x == 0) init_mbarriers_alone(4608, {1});
    fill_with_ones();
    if (threadIdx.x >= kThreads) {  // overwrites b once it has been released
      mbarrier_wait(4608, 0);
      fill_b(0);
      return;
    }
    float d[8] = {};
    multiply_in_a_group(d);
    wgmma_wait_group(0);
    if (threadIdx.x == 0) mbarrier_arrive(4608);
    CHECK(d[0] == 16 && d[7] == 16);
  });
}

TEST(one_accumulator_over_several_groups) {
  for_each_schedule(1, [] {
    run_warpgroup([](float* d) {
      for (int step = 0; step < 5; ++step) {
        multiply_in_a_group(d);
        wgmma_wait_group(1);
      }
      wgmma_wait_group(0);
      for (int i = 0; i < 8; ++i) CHECK(d[i] == 5 * 16);
    });
  });
}

#ifndef EMULATOR_RACE  // the write that shows it is a race
TEST(nothing_starts_before_all_four_warps_have_committed) {
  for_each_completion([] {
    run_warpgroup([](float* d) {
      if (threadIdx.x / 32 == 3) {
        bar_sync(1, kThreads);
        for (int i = 0; i < 100; ++i) yield();
        fill_b(0x4000);
        fence_proxy_async_shared();
        syncwarp(~0u);
      }
      multiply_in_a_group(d);
      if (threadIdx.x / 32 != 3) bar_arrive(1, kThreads);
      wgmma_wait_group(0);
      CHECK(d[0] == 32);
    });
  });
}
#endif

TEST(wait_leaves_later_groups_alone) {
  run_warpgroup([](float* d) {
    float e[8] = {};
    const bool is_late = threadIdx.x / 32 == 3;
    multiply_in_a_group(d);
    if (is_late) bar_sync(1, kThreads);
    multiply_in_a_group(e);
    wgmma_wait_group(1);
    CHECK(d[0] == 16);
    if (!is_late) bar_arrive(1, kThreads);
    wgmma_wait_group(0);
    CHECK(e[0] == 16);
  });
}

TEST(two_warpgroups_are_independent) {
  launch(blocks_of(256, kShared), [] {
    fill_with_ones();
    float d[8] = {};
    const uint32_t rounds = threadIdx.x < 128 ? 3 : 1;
    for (uint32_t round = 0; round < rounds; ++round) {
      multiply_in_a_group(d);
      wgmma_wait_group(0);
    }
    CHECK(d[0] == float(16 * rounds));
  });
}

TEST(accumulators_in_flight_are_poison) {
  for_each_completion([] {
    run_warpgroup([](float* d) {
      wgmma_fence();
      multiply(d);
      CHECK(std::isnan(d[3]));
      wgmma_commit_group();
      for (int i = 0; i < 200; ++i) yield();
      CHECK(std::isnan(d[3]));
      wgmma_wait_group(1);
      CHECK(std::isnan(d[3]));
      wgmma_wait_group(0);
      CHECK(d[3] == 16);
    });
  });
}

TEST(fence_is_required) {
  const char* const kText = "expected wgmma_fence";
  CHECK_FAILS(kMisuse, kText, run_warpgroup([](float* d) { multiply(d); }));
  CHECK_FAILS(kMisuse, kText, run_warpgroup([](float* d) {
                float e[8] = {};
                multiply_in_a_group(d);
                multiply(e);
              }));
  CHECK_FAILS(kMisuse, kText, run_warpgroup([](float* d) {
                const uint32_t a[4] = {};
                multiply_in_a_group(d);
                wgmma_rs(kShape, d, a, kB, true);
              }));
  // wgmmas of one shape on accumulators in flight follow each other without a fence.
  run_warpgroup([](float* d) {
    multiply_in_a_group(d);
    multiply(d);
    wgmma_commit_group();
    wgmma_wait_group(0);
    CHECK(d[3] == 32);
  });
  CHECK_FAILS(kMisuse, kText, run_warpgroup([](float* d) {
                multiply_in_a_group(d);
                wgmma_fence();
                wgmma_wait_group(0);
                multiply(d);
              }));
}

TEST(accumulators_written_between_fence_and_wgmma) {
  CHECK_FAILS(kMisuse, "written after wgmma_fence", run_warpgroup([](float* d) {
                multiply_in_a_group(d);
                wgmma_wait_group(0);
                wgmma_fence();
                d[2] *= 0.5f;
                multiply(d);
              }));
  run_warpgroup([](float* d) {
    multiply_in_a_group(d);
    wgmma_wait_group(0);
    d[2] *= 0.5f;
    multiply_in_a_group(d);
    wgmma_wait_group(0);
    CHECK(d[2] == 24 && d[3] == 32);
  });
}

TEST(accumulators_written_in_flight) {
  CHECK_FAILS(kMisuse, "written while a wgmma was using them", run_warpgroup([](float* d) {
                multiply_in_a_group(d);
                d[1] = 0;
                wgmma_wait_group(0);
              }));
}

TEST(accumulators_that_overlap) {
  CHECK_FAILS(kMisuse, "overlap those of an m64n16k16", run_warpgroup([](float* d) {
                wgmma_fence();
                multiply(d);
                wgmma_ss({Format::kBFloat16, 8, Major::kK, Major::kK}, d, kA, kB, true);
              }));
}

TEST(fragments_rewritten_in_flight) {
  const auto kernel = [](bool wait) {
    run_warpgroup([wait](float* d) {
      uint32_t a[4] = {0x3F803F80, 0x3F803F80, 0x3F803F80, 0x3F803F80};
      wgmma_fence();
      wgmma_rs(kShape, d, a, kB, true);
      wgmma_commit_group();
      if (wait) wgmma_wait_group(0);
      a[0] = 0;
      wgmma_fence();
      wgmma_rs(kShape, d, a, kB, true);
      wgmma_commit_group();
      wgmma_wait_group(0);
      CHECK(d[2] == 32);
    });
  };
  kernel(true);
  CHECK_FAILS(kMisuse, "registers of a were rewritten", kernel(false));
}

TEST(fragments_loaded_at_the_wrong_time) {
  const auto kernel = [](bool fence_after, bool wait) {
    run_warpgroup([=](float* d) {
      uint32_t a[4];
      const uint32_t row = threadIdx.x % 16 * 16;
      ldmatrix(4, false, a, row);
      if (!fence_after) wgmma_fence();
      ldmatrix(4, false, a, row);
      if (fence_after) wgmma_fence();
      wgmma_rs(kShape, d, a, kB, true);
      wgmma_commit_group();
      if (wait) wgmma_wait_group(0);
      ldmatrix(4, false, a, row);
      wgmma_wait_group(0);
      CHECK(d[2] == 16);
    });
  };
  kernel(true, true);
  CHECK_FAILS(kMisuse, "loaded after wgmma_fence", kernel(false, true));
  CHECK_FAILS(kMisuse, "loaded while a wgmma in flight reads them", kernel(true, false));
}

TEST(groups_not_waited_for) {
  CHECK_FAILS(ErrorKind::ExitCheck, "1 wgmmas in no group", run_warpgroup([](float* d) {
                wgmma_fence();
                multiply(d);
              }));
  CHECK_FAILS(ErrorKind::ExitCheck, "without wgmma_wait_group<0>", run_warpgroup([](float* d) {
                multiply_in_a_group(d);
                wgmma_wait_group(1);
              }));
}

TEST(warps_that_differ) {
  const auto warp = [] { return threadIdx.x / 32; };
  CHECK_FAILS(kMisuse, "the warps of a warpgroup differ", run_warpgroup([&](float* d) {
                wgmma_fence();
                wgmma_ss(kShape, d, kA, warp() == 2 ? kA : kB, true);
                wgmma_commit_group();
                wgmma_wait_group(0);
              }));
  CHECK_FAILS(kMisuse, "committed", run_warpgroup([&](float* d) {
                wgmma_fence();
                multiply(d);
                if (warp() == 1) multiply(d);
                wgmma_commit_group();
                wgmma_wait_group(0);
              }));
  CHECK_FAILS(ErrorKind::Deadlock,
              "wgmma group 0 of warpgroup 0: committed by 3 and executed in 0 of four warps",
              run_warpgroup([&](float* d) {
                wgmma_fence();
                multiply(d);
                if (warp() == 3) bar_sync(1, 64);
                wgmma_commit_group();
                wgmma_wait_group(0);
              }));
}

TEST(lanes_that_differ) {
  CHECK_FAILS(kMisuse, "of lanes 0 and 7 differ", run_warpgroup([](float* d) {
                wgmma_fence();
                wgmma_ss(kShape, d, kA, kB, threadIdx.x % 32 != 7);
              }));
}

TEST(incomplete_warpgroup) {
  CHECK_FAILS(kMisuse, "fewer than four warps",
              run_warpgroup(
                  [](float* d) {
                    wgmma_fence();
                    multiply(d);
                  },
                  96));
}

TEST(bad_operands) {
  const auto kernel = [](WgmmaShape shape, uint64_t a, uint64_t b) {
    run_warpgroup([=](float* d) {
      wgmma_fence();
      wgmma_ss(shape, d, a, b, true);
      wgmma_commit_group();
      wgmma_wait_group(0);
    });
  };
  kernel(kShape, kA, kB);
  CHECK_FAILS(kMisuse, "N is 12", kernel({Format::kBFloat16, 12, Major::kK, Major::kK}, kA, kB));
  CHECK_FAILS(kMisuse, "the descriptor of a", kernel(kShape, kA | 1ull << 50, kB));
  CHECK_FAILS(kMisuse, "the descriptor of b",
              kernel(kShape, kA, descriptor_bits(4096 + 128, 16, 256, Swizzle::k32)));
  CHECK_FAILS(kMisuse, "lie outside",
              kernel(kShape, kA, descriptor_bits(kShared, 16, 256, Swizzle::k32)));
}

}  // namespace
