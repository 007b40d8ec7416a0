// The race checker and arrivals at another block's mbarrier: what the default form, .release at
// .cta scope, orders, and what only .release.cluster does.
#include "emulator/selftests/race_kernels.h"

namespace emulator::selftest {
namespace {

constexpr uint32_t kRows = 16, kColumns = 64;  // of halves: a half of a stage
constexpr uint32_t kHalfStage = kRows * kColumns * 2;
constexpr uint32_t kFull = 8192, kEmpty = kFull + 8;  // shared addresses of mbarriers
constexpr uint32_t kValue = 8448;
constexpr uint32_t kConsumers = 128, kProducer = 128, kThreads = 160;
constexpr uint16_t kOne = 0x3C00;  // 1 in fp16

CUtensorMap map_of(GlobalBuffer<uint16_t>& buffer) {
  return tensor_map(buffer.data(), CU_TENSOR_MAP_DATA_TYPE_FLOAT16, Swizzle::kNone, kColumns,
                    2 * kRows, kColumns * 2, kColumns, kRows);
}

uint64_t operand_at(uint32_t address) {  // no swizzle; every byte pair of the stage holds 1
  return uint64_t{address >> 4} | uint64_t{128 >> 4} << 16 | uint64_t{256 >> 4} << 32;
}

// The ring of lora_gemm on sm_90a with one stage: a producer of either block multicasts half of it
// into both, consumers of both release it to both.
TEST(a_stage_that_wgmma_has_read_is_released_by_the_default_arrival) {
  const auto run = [] {
    GlobalBuffer<uint16_t> in(2 * kRows * kColumns, "in");
    in.fill(kOne);
    const CUtensorMap map = map_of(in);
    launch(race_launch(2, kThreads, 16384, 2), [&] {
      init_mbarriers_of_cluster(kFull, {1, 2 * kConsumers / 32});
      const uint32_t rank = cluster_rank();
      for (uint32_t step = 0; step < 3; ++step) {
        if (threadIdx.x == kProducer) {
          mbarrier_wait(kEmpty, (step & 1) ^ 1);
          mbarrier_arrive_expect_tx(kFull, 2 * kHalfStage);
          tma_load_2d_multicast(rank * kHalfStage, &map, kFull, 0, static_cast<int>(rank * kRows),
                                3);
        }
        if (threadIdx.x < kConsumers) {
          const auto release = [] {
            if (threadIdx.x % 32 < 2) mbarrier_arrive_remote(kEmpty, threadIdx.x % 32);
          };
          mbarrier_wait(kFull, step & 1);
          float d[4];
          wgmma_fence();
          wgmma_ss({Format::kFloat16, 8, Major::kK, Major::kK}, d, operand_at(0), operand_at(2048),
                   false);
          wgmma_commit_group();
          if (missing("wait")) release();
          wgmma_wait_group(0);
          // Read by the lane that releases this half of the stage.
          if (missing("read by a thread") && threadIdx.x % 32 == 0)
            CHECK(shared_array<uint16_t>()[threadIdx.x] == kOne);
          if (!missing("wait")) release();
          CHECK(d[0] == 16 || missing_edge != "");
        }
      }
      sync_cluster();
    });
  };
  expect_clean(run);
  expect_diagnosis("wait", run);
  expect_race("read by a thread", "write after unordered read", run);
}

// A value that a thread stores into its peer's memory, and one that it writes to its own for the
// peer to read.
TEST(the_default_arrival_hands_no_store_to_a_peer) {
  const auto run = [](bool into_peer) {
    launch(race_launch(2, 32, 16384, 2), [&] {
      init_mbarriers_of_cluster(kFull, {1, 1});
      if (threadIdx.x == 0) {
        const uint32_t value = map_shared(kValue, into_peer ? 1 : 0);
        if (cluster_rank() == 0) {
          store_shared_cluster<uint32_t>(value, 7);
          missing("release") ? mbarrier_arrive_remote(kFull, 1) : mbarrier_arrive_cluster(kFull, 1);
        } else {
          mbarrier_wait_cluster(kFull, 0);
          CHECK(load_shared_cluster<uint32_t>(value) == 7 || missing_edge != "");
        }
      }
      sync_cluster();
    });
  };
  for (const bool into_peer : {false, true}) {
    expect_clean([&] { run(into_peer); });
    expect_race("release", "read after unordered write", [&] { run(into_peer); });
  }
}

// The same for data of a copy: the peer may overwrite it, but not read it.
TEST(the_default_arrival_hands_no_copied_bytes_to_a_peer) {
  const auto run = [] {
    GlobalBuffer<uint16_t> in(2 * kRows * kColumns, "in");
    in.fill(kOne);
    const CUtensorMap map = map_of(in);
    launch(race_launch(2, 32, 16384, 2), [&] {
      init_mbarriers_of_cluster(kFull, {1, 1});
      if (threadIdx.x == 0 && cluster_rank() == 0) {
        mbarrier_arrive_expect_tx(kFull, kHalfStage);
        tma_load_2d(0, &map, kFull, 0, 0);
        mbarrier_wait(kFull, 0);
        missing("release") ? mbarrier_arrive_remote(kEmpty, 1) : mbarrier_arrive_cluster(kEmpty, 1);
      }
      if (threadIdx.x == 0 && cluster_rank() == 1) {
        mbarrier_wait_cluster(kEmpty, 0);
        const uint32_t there = map_shared(0, 0);
        CHECK(load_shared_cluster<uint32_t>(there) == 0x3C003C00u || missing_edge != "");
      }
      sync_cluster();
    });
  };
  expect_clean(run);
  expect_race("release", "read after unordered write", run);
}

// Within its own block it is an arrival like any other.
TEST(the_default_arrival_releases_to_its_own_block) {
  const auto run = [] {
    launch(race_launch(2, 64, 16384, 2), [] {
      init_mbarriers_of_cluster(kFull, {1, 1});
      if (threadIdx.x == 0) {
        shared_array<uint32_t>(kValue)[0] = 7;
        if (!missing("arrive")) mbarrier_arrive_remote(kFull, cluster_rank());
      }
      if (threadIdx.x == 32) {
        if (!missing("arrive")) mbarrier_wait(kFull, 0);
        CHECK(shared_array<uint32_t>(kValue)[0] == 7 || missing_edge != "");
      }
      sync_cluster();
    });
  };
  expect_clean(run);
  expect_diagnosis("arrive", run);
}

}  // namespace
}  // namespace emulator::selftest
