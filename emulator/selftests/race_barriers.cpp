// The race checker and the barriers of blocks, warps and clusters; granularity and initialisation
// of memory.
#include "emulator/selftests/race_kernels.h"

namespace emulator::selftest {
namespace {

TEST(syncthreads_orders_shared_memory) {
  const auto run = [] {
    launch(race_launch(2, 96), [] {
      int* values = shared_array<int>();
      values[threadIdx.x] = 0;
      __syncthreads();
      for (int round = 0; round < 3; ++round) {
        values[threadIdx.x] = round;
        if (!missing("after write")) __syncthreads();
        const int read = values[(threadIdx.x + 33) % 96];
        if (!missing("before overwrite")) __syncthreads();
        CHECK(read == round || missing_edge != "");
      }
    });
  };
  expect_clean(run);
  expect_race("after write", "missing: no barrier", run);
  expect_race("before overwrite", "missing: no barrier", run);
}

// Producers arrive, consumers wait: bar.arrive orders as bar.sync does, but only towards those that
// sync.
TEST(named_barriers_order_producers_and_consumers) {
  const auto run = [] {
    launch(race_launch(1, 128), [] {
      constexpr int kFull = 1, kEmpty = 2, kRounds = 3;
      int* values = shared_array<int>();
      const bool producer = threadIdx.x < 64;
      values[threadIdx.x % 64 + 64 * producer] = 0;
      __syncthreads();
      for (int round = 0; round < kRounds; ++round) {
        if (producer) {
          if (round > 0) bar_sync(kEmpty, 128);
          values[threadIdx.x] = round;
          bar_arrive(kFull, 128);
        } else {
          if (!missing("full")) bar_sync(kFull, 128);
          if (missing("empty") && round + 1 < kRounds) bar_arrive(kEmpty, 128);
          const int value = values[threadIdx.x - 64];
          if (missing("full")) bar_sync(kFull, 128);
          if (!missing("empty") && round + 1 < kRounds) bar_arrive(kEmpty, 128);
          CHECK(value == round || missing_edge != "");
        }
      }
    });
  };
  expect_clean(run);
  expect_race("full", "unordered", run);
  expect_race("empty", "unordered", run);
}

TEST(syncwarp_orders_lanes) {
  const auto run = [] {
    launch(race_launch(1, 64), [] {
      int* values = shared_array<int>();
      values[threadIdx.x] = 0;
      __syncthreads();
      values[threadIdx.x] = 1;
      if (!missing("first")) __syncwarp();
      const int neighbour = values[threadIdx.x ^ 1];
      if (!missing("second")) __syncwarp();
      values[threadIdx.x] = neighbour + 1;
    });
  };
  expect_clean(run);
  expect_race("first", "unordered", run);
  expect_race("second", "unordered", run);
}

// A shuffle exchanges registers, it orders no memory (CUDA C++ guide, "Warp Shuffle Functions").
TEST(a_shuffle_is_no_barrier) {
  CHECK_FAILS(ErrorKind::Race, "write after unordered write", launch(race_launch(1, 32), [] {
                int* values = shared_array<int>();
                if (threadIdx.x == 0) values[0] = 1;
                __shfl_sync(~0u, 1, 0);
                if (threadIdx.x == 1) values[0] = 2;
              }));
}

TEST(cluster_barriers_order_distributed_memory) {
  const auto run = [] {
    launch(race_launch(4, 32, 1024, 2), [] {
      const auto mine = static_cast<uint32_t>(threadIdx.x * 4);
      const uint32_t peer = map_shared(mine, cluster_rank() ^ 1);
      shared_array<uint32_t>()[threadIdx.x] = 9;
      sync_cluster();
      shared_array<uint32_t>()[threadIdx.x] = cluster_rank();
      missing("release") ? cluster_arrive_relaxed() : cluster_arrive();
      cluster_wait();
      const uint32_t value = load_shared_cluster<uint32_t>(peer);
      if (!missing("before overwrite")) sync_cluster();
      store_shared_cluster<uint32_t>(mine, value);
      sync_cluster();
      CHECK(value == (cluster_rank() ^ 1) || missing_edge != "");
    });
  };
  expect_clean(run);
  expect_race("release", "unordered write", run);
  expect_race("before overwrite", "unordered", run);
}

TEST(a_block_barrier_does_not_order_a_peer) {
  CHECK_FAILS(ErrorKind::Race, "unordered", launch(race_launch(2, 32, 1024, 2), [] {
                sync_cluster();
                store_shared_cluster<uint32_t>(map_shared(0, 1), 1);
                __syncthreads();
                sync_cluster();
              }));
}

// Neighbouring halves and bytes of one word may belong to different threads.
TEST(neighbours_in_a_word_do_not_race) {
  expect_clean([] {
    GlobalBuffer<uint16_t> halves(64, "halves");
    GlobalBuffer<uint8_t> bytes(64, "bytes");
    launch(race_launch(1, 64), [&] {
      halves[threadIdx.x] = 1;
      bytes[threadIdx.x] = 1;
      shared_array<uint16_t>()[threadIdx.x] = halves[threadIdx.x];
    });
  });
}

TEST(same_value_writes_race) {
  GlobalBuffer<uint32_t> word(1, "word");
  CHECK_FAILS(ErrorKind::Race, "global buffer 'word', byte 0",
              launch(race_launch(1, 64), [&] { word[0] = 7; }));
}

TEST(uninitialised_memory_is_noticed) {
  CHECK_FAILS(ErrorKind::Uninitialised, "shared memory of block (0,0,0), address 0x10",
              launch(race_launch(1, 32), [] {
                volatile int* values = shared_array<int>();
                if (threadIdx.x == 3) values[8] = values[4];
              }));
  GlobalBuffer<int> filled(4, "filled"), empty(4, "empty");
  filled.fill(1);
  launch(race_launch(1, 32), [&] {
    if (threadIdx.x < 4) empty[threadIdx.x] = filled[threadIdx.x];
  });
  launch(race_launch(1, 32), [&] {
    if (threadIdx.x < 4) filled[threadIdx.x] = empty[threadIdx.x];
  });
  GlobalBuffer<int> poisoned(4, "poisoned");
  CHECK_FAILS(ErrorKind::Uninitialised, "global buffer 'poisoned', byte 8",
              launch(race_launch(1, 32), [&] {
                if (threadIdx.x == 0) filled[0] = poisoned[2];
              }));
}

TEST(accesses_past_the_end_are_noticed) {
  GlobalBuffer<int> buffer(5, "buffer");
  buffer.fill(1);
  for (int at : {-1, 5})
    CHECK_FAILS(ErrorKind::Misuse, "outside of the 20 bytes of global buffer 'buffer'",
                launch(race_launch(1, 32), [&, at] {
                  if (threadIdx.x == 3) buffer[0] = buffer.data()[at];
                }));
  CHECK_FAILS(ErrorKind::Misuse,
              "outside of the 1024 bytes of shared memory of block (0,0,0), address 0x400",
              launch(race_launch(1, 32), [] { shared_array<int>()[threadIdx.x + 225] = 1; }));
}

// Blocks of one grid are not ordered, even if one runs after the other has exited.
TEST(blocks_race_on_global_memory) {
  GlobalBuffer<int> buffer(1, "buffer");
  for_each_schedule(2, [&] {
    config().resident_clusters = 1;
    CHECK_FAILS(ErrorKind::Race, "block (", launch(race_launch(4, 32), [&] {
                  if (threadIdx.x == 0) buffer[0] = static_cast<int>(blockIdx.x);
                }));
  });
}

// Accesses that nothing can conflict with any more are dropped; the others still can after
// millions.
TEST(a_long_kernel) {
  const auto run = [] {
    GlobalBuffer<int> early(1, "early");
    launch(race_launch(1, 64), [&] {
      int* values = shared_array<int>();
      if (threadIdx.x == 63) early[0] = 1;
      values[threadIdx.x] = 0;
      for (int round = 0; round < 12000; ++round) {
        __syncwarp();
        const int neighbour = values[threadIdx.x ^ 1];
        __syncwarp();
        values[threadIdx.x] = neighbour + 1;
      }
      if (!missing("barrier")) __syncthreads();
      if (threadIdx.x == 0) early[0] = 2;
    });
  };
  run();
  missing_edge = "barrier";
  CHECK_FAILS(ErrorKind::Race, "global buffer 'early'", run());
  missing_edge.clear();
}

TEST(a_report_names_both_lines) {
  GlobalBuffer<int> buffer(1, "buffer");
  try {
    launch(race_launch(1, 64), [&] {
      if (threadIdx.x == 0) buffer[0] = 1;
      if (threadIdx.x == 40) buffer[0] = 2;
    });
  } catch (const Error& error) {
    const std::string text = error.what();
    const size_t first = text.find("selftests/race_barriers.cpp:");
    CHECK(first != std::string::npos);
    CHECK(text.find("selftests/race_barriers.cpp:", first + 1) != std::string::npos);
    CHECK(text.find("thread 0 = warp 0 lane 0") != std::string::npos);
    CHECK(text.find("thread 40 = warp 1 lane 8") != std::string::npos);
    return;
  }
  CHECK(false && "no race was reported");
}

}  // namespace
}  // namespace emulator::selftest
