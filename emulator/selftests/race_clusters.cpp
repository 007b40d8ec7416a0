// The race checker and what two blocks of a cluster share: mbarriers at which the peer arrives, the
// scope of a wait, and the life of the peer's memory.
#include "emulator/selftests/race_kernels.h"

namespace emulator::selftest {
namespace {

constexpr uint32_t kFull = 0, kEmpty = 8, kValue = 64;
constexpr int kRounds = 5;

// Block 0 stores a value into block 1, which reads it; both rings of one slot are mbarriers.
TEST(a_peers_store_needs_a_wait_of_cluster_scope) {
  const auto run = [] {
    launch(race_launch(2, 32, 1024, 2), [] {
      init_mbarriers_of_cluster(kFull, {1, 1});
      if (threadIdx.x == 0) {
        for (int round = 0; round < kRounds; ++round) {
          const uint32_t parity = round & 1;
          if (cluster_rank() == 0) {
            // The peer has only read: an acquire of block scope lets the next store follow.
            if (!missing("empty")) mbarrier_wait(kEmpty, parity ^ 1);
            store_shared_cluster<uint32_t>(map_shared(kValue, 1), round);
            if (missing("empty")) mbarrier_wait(kEmpty, parity ^ 1);
            mbarrier_arrive_cluster(kFull, 1);
          } else {
            missing("scope") ? mbarrier_wait(kFull, parity) : mbarrier_wait_cluster(kFull, parity);
            const auto value = load_shared_cluster<uint32_t>(kValue);
            CHECK(value == static_cast<uint32_t>(round) || missing_edge != "");
            mbarrier_arrive_cluster(kEmpty, 0);
          }
        }
      }
      sync_cluster();
    });
  };
  expect_clean(run);
  expect_race("scope", "read after unordered write", run);
  expect_diagnosis("empty", run);
}

// The example of the PTX ISA: the fence publishes the init, so the arrival may be relaxed. What
// else the thread wrote it does not publish.
TEST(fence_mbarrier_init_publishes_the_init_alone) {
  const auto run = [] {
    launch(race_launch(2, 64, 1024, 2), [] {
      if (threadIdx.x == 0) {
        mbarrier_init(kFull, 64);
        shared_array<uint32_t>(kValue)[0] = 7;
        if (!missing("fence")) fence_mbarrier_init();
      }
      cluster_arrive_relaxed();
      cluster_wait();
      if (missing("release")) (void)load_shared_cluster<uint32_t>(kValue);
      missing("fence") ? mbarrier_arrive(kFull)
                       : mbarrier_arrive_cluster(kFull, cluster_rank() ^ 1);
      mbarrier_wait(kFull, 0);
      sync_cluster();
    });
  };
  expect_clean(run);
  expect_race("fence", "mbarrier", run);
  expect_race("release", "read after unordered write", run);
}

// Without an edge, block 1 ends too early. Reported by the first to notice: the end of the block,
// or an access to its memory, which is then out of bounds.
void expect_end_of_peer(const char* edge, const std::function<void()>& run) {
  for_each_schedule_without(edge, [&] {
    try {
      run();
    } catch (const Error& error) {
      const std::string text = error.what();
      CHECK(text.find("the end of block (1,0,0)") != std::string::npos ||
            text.find("has exited") != std::string::npos);
      return;
    }
    CHECK(!"expected a fault");
  });
}

// A remote arrival that is not waited for is complete before an arrive with release, not before a
// relaxed one: after that the peer may have ended while it is in flight.
TEST(a_block_must_not_end_under_a_remote_arrival) {
  const auto run = [] {
    launch(race_launch(2, 32, 1024, 2), [] {
      if (threadIdx.x == 0) init_mbarriers_alone(kEmpty, {2});
      cluster_arrive_relaxed();
      cluster_wait();
      if (threadIdx.x == 0 && cluster_rank() == 0) mbarrier_arrive_remote(kEmpty, 1);
      missing("release") ? cluster_arrive_relaxed() : cluster_arrive();
      cluster_wait();
    });
  };
  expect_clean(run);
  expect_end_of_peer("release", run);
}

TEST(a_block_must_not_end_before_its_peer_has_read) {
  const auto run = [] {
    launch(race_launch(2, 32, 1024, 2), [] {
      shared_array<uint32_t>(kValue)[threadIdx.x] = threadIdx.x;
      sync_cluster();
      cluster_arrive();
      if (!missing("barrier")) cluster_wait();
      if (cluster_rank() == 0) {
        (void)load_shared_cluster<uint32_t>(map_shared(kValue + 4 * threadIdx.x, 1));
      }
      missing("barrier") ? cluster_wait() : sync_cluster();
    });
  };
  expect_clean(run);
  expect_end_of_peer("barrier", run);
}

}  // namespace
}  // namespace emulator::selftest
