// mbarriers, used rightly and wrongly.
#include "emulator/selftests/kernels.h"

namespace {

using namespace emulator;
using namespace emulator::selftest;

TEST(phases_pass_data_both_ways) {
  GlobalBuffer<uint32_t> out(8, "out");
  const auto kernel = [&] {
    init_mbarriers(0, {32, 32});  // full, empty
    uint32_t* slot = shared_array<uint32_t>(64);
    if (threadIdx.x < 32) {
      for (uint32_t round = 0; round < 8; ++round) {
        mbarrier_wait(8, (round & 1) ^ 1);  // the first wait passes: no phase has completed yet
        slot[threadIdx.x] = round * 100 + threadIdx.x;
        mbarrier_arrive(0);
      }
    } else {
      for (uint32_t round = 0; round < 8; ++round) {
        mbarrier_wait(0, round & 1);
        uint32_t sum = 0;
        for (uint32_t i = 0; i < 32; ++i) sum += slot[i];
        if (threadIdx.x == 32) out[round] = sum;
        mbarrier_arrive(8);
      }
    }
  };
  run_everywhere(blocks_of(64, 1024), kernel, [&] {
    for (uint32_t round = 0; round < 8; ++round) CHECK(out[round] == round * 3200 + 496);
  });
}

TEST(try_wait_fails_before_the_phase_completes_and_passes_after) {
  GlobalBuffer<uint32_t> failures(1, "failures");
  failures[0] = 0;
  run_everywhere(blocks_of(64, 1024), [&] {
    init_mbarriers(0, {1});
    if (threadIdx.x == 0) {
      for (int i = 0; i < 50; ++i) yield();
      mbarrier_arrive(0);
    } else if (threadIdx.x == 32) {
      while (!mbarrier_try_wait(0, 0)) ++failures[0];
      CHECK(mbarrier_try_wait(0, 0));  // parity 0 is now that of the phase before
    }
  });
  CHECK(failures[0] > 0);
}

// Runs `body` in the one thread of a block, expecting a misuse.
void expect_misuse(const char* text, const std::function<void()>& body) {
  CHECK_FAILS(kMisuse, text, launch(blocks_of(1, 1024), body));
}

TEST(misused_init) {
  expect_misuse("count 0", [] { mbarrier_init(0, 0); });
  expect_misuse("expected 1..1048575", [] { mbarrier_init(0, 1 << 20); });
  expect_misuse("not 8-byte aligned", [] { mbarrier_init(4, 1); });
  expect_misuse("lie outside", [] { mbarrier_init(1024, 1); });
  expect_misuse("there is one already", [] {
    mbarrier_init(0, 1);
    mbarrier_init(0, 1);
  });
}

TEST(misused_objects) {
  expect_misuse("holds no mbarrier", [] { mbarrier_arrive(0); });
  expect_misuse("holds no mbarrier", [] { mbarrier_wait(8, 0); });
  expect_misuse("was overwritten", [] {
    mbarrier_init(0, 1);
    shared_array<uint32_t>()[1] = 0;
    mbarrier_arrive(0);
  });
  expect_misuse("phase parity 2", [] {
    mbarrier_init(0, 1);
    mbarrier_wait(0, 2);
  });
}

TEST(miscounted_arrivals_and_bytes) {
  expect_misuse("more than the 1 expected arrivals", [] {
    mbarrier_init(0, 1);
    mbarrier_arrive_expect_tx(0, 16);
    mbarrier_arrive(0);
  });
  expect_misuse("the tx-count leaves", [] {
    mbarrier_init(0, 1);
    mbarrier_expect_tx(0, (1 << 20) - 1);
    mbarrier_expect_tx(0, 1);
  });
}

TEST(deadlock_names_the_barrier_and_its_state) {
  const auto kernel = [] {
    init_mbarriers(64, {3});
    if (threadIdx.x == 0) mbarrier_arrive_expect_tx(64, 4096);
    mbarrier_wait(64, 0);
  };
  for_each_schedule(1, [&] {
    CHECK_FAILS(ErrorKind::Deadlock,
                "mbarrier 0x40 of rank 0: phase 0 (parity 0), 2 of 3 arrivals pending, tx-count "
                "4096 bytes",
                launch(blocks_of(32, 1024), kernel));
  });
  CHECK_FAILS(ErrorKind::Deadlock, "mbarrier 0x40", launch(blocks_of(32, 1024), [] {
                init_mbarriers(64, {33});
                mbarrier_arrive(64);
                while (!mbarrier_try_wait(64, 0)) {
                }
              }));
}

TEST(expected_bytes_must_be_waited_for) {
  CHECK_FAILS(ErrorKind::ExitCheck, "no thread has waited for the copies of phase 0",
              launch(blocks_of(1, 1024), [] {
                mbarrier_init(0, 1);
                mbarrier_arrive_expect_tx(0, 16);
              }));
}

// ---- clusters -----------------------------------------------------------------------------------

constexpr uint32_t kThreads = 32;

TEST(blocks_of_a_cluster_arrive_at_each_other) {
  GlobalBuffer<uint32_t> out(4 * 4, "out");
  const auto kernel = [&] {
    init_mbarriers_of_cluster(0, {4});
    const uint32_t rank = cluster_rank();
    for (uint32_t round = 0; round < 4; ++round) {
      if (threadIdx.x < 4) mbarrier_arrive_cluster(0, threadIdx.x);
      mbarrier_wait(0, round & 1);
      syncthreads();  // or a slow thread misses a phase
      if (threadIdx.x == 0) out[rank * 4 + round] = round + rank;
    }
    sync_cluster();
  };
  run_everywhere(blocks_of(kThreads, 1024, 4), kernel, [&] {
    for (uint32_t i = 0; i < 16; ++i) CHECK(out[i] == i / 4 + i % 4);
  });
}

TEST(remote_arrival_needs_a_fenced_init) {
  for (const bool fenced_by_another : {false, true}) {
    CHECK_FAILS(kMisuse, "has not executed fence_mbarrier_init",
                launch(blocks_of(32, 1024, 2), [&] {
                  if (threadIdx.x == 0) mbarrier_init(0, 2);
                  if (threadIdx.x == 1 && fenced_by_another) fence_mbarrier_init();
                  sync_cluster();
                  if (threadIdx.x == 0) mbarrier_arrive_cluster(0, cluster_rank() ^ 1);
                  sync_cluster();
                }));
  }
}

TEST(remote_arrival_outside_of_the_cluster) {
  CHECK_FAILS(kMisuse, "rank 2", launch(blocks_of(32, 1024, 2), [] {
                init_mbarriers_of_cluster(0, {2});
                if (threadIdx.x == 0) mbarrier_arrive_cluster(0, 2);
                sync_cluster();
              }));
}

TEST(remote_arrival_at_a_block_that_has_exited) {
  for_each_completion([] {
    CHECK_FAILS(kMisuse, "has exited", launch(blocks_of(32, 1024, 2), [] {
                  init_mbarriers_of_cluster(0, {32});
                  if (cluster_rank() == 1) return;
                  wait_until_exited(1);
                  mbarrier_arrive_cluster(0, 1);
                }));
  });
}

#ifndef EMULATOR_RACE  // where it races with the end of the block
TEST(remote_arrival_in_flight_when_the_block_exits) {
  bool issued = false;
  CHECK_FAILS(ErrorKind::ExitCheck, "mbarrier.arrive.release.cluster.shared::cluster",
              launch(blocks_of(32, 1024, 2), [&] {
                init_mbarriers_of_cluster(0, {1});
                if (cluster_rank() == 0 && threadIdx.x == 0) {
                  mbarrier_arrive_cluster(0, 1);
                  issued = true;
                }
                while (cluster_rank() == 1 && !issued) yield();
              }));
}
#endif

TEST(remote_arrival_before_the_block_has_started) {
  const KeepConfig keep;
  int not_started = 0;
  for (config().seed = 1; config().seed <= 40; ++config().seed) {
    try {
      launch(blocks_of(32, 1024, 2), [] {
        init_mbarriers(0, {32});
        if (cluster_rank() == 0) mbarrier_arrive_cluster(0, 1);
        sync_cluster();
      });
    } catch (const Error& error) {
      CHECK(error.kind == kMisuse || error.kind == ErrorKind::ExitCheck ||
            error.kind == ErrorKind::Race);
      not_started += std::string(error.what()).find("has not started") != std::string::npos;
    }
  }
  CHECK(not_started > 0);
}

}  // namespace
