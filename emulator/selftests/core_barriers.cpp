// Named barriers, cluster barriers, setmaxnreg, and what deadlock reports and exit checks say about
// them.
#include "emulator/selftests/kernels.h"

using namespace emulator;
using namespace emulator::selftest;

// ---- named barriers -----------------------------------------------------------------------------

TEST(named_barriers) {
  for_each_schedule(4, [&] {
    int produced = 0, arrived[2] = {};
    launch({.grid = 2, .block = 128}, [&] {
      int& count = arrived[blockIdx.x];
      ++count;
      __syncthreads();
      CHECK(count == 128);
      __syncthreads();
      // Warps 0 and 1 meet at barrier 1 while 2 and 3 meet at barrier 2.
      ++count;
      bar_sync(1 + threadIdx.x / 64, 64);
      CHECK(count >= 128 + 64);
      __syncthreads();
      // Warp 0 waits at a barrier at which the others only arrive.
      if (threadIdx.x >= 32) {
        ++produced;
        bar_arrive(3, 128);
      } else {
        bar_sync(3, 128);
        CHECK(produced >= 96);
      }
    });
  });
  launch({.grid = 1, .block = 48}, [] { __syncthreads(); });  // a last warp of 16 lanes takes part
}

TEST(named_barrier_misuse) {
  const auto rejects = rejecting({.grid = 1, .block = 128});
  rejects("barrier 16", kMisuse, "there are 16 barriers", [] { bar_sync(16, 128); });
  rejects("48 threads", kMisuse, "not a multiple of the warp size", [] { bar_sync(1, 48); });
  rejects("more threads than the block has", kMisuse, "the block has 128",
          [] { bar_sync(1, 160); });
  rejects("two counts in one phase", kMisuse, "others of this phase came with",
          [] { bar_sync(1, threadIdx.x < 64 ? 128 : 64); });
  rejects("a warp arrives twice in one phase", kMisuse, "arrives twice", [] {
    if (threadIdx.x < 32) {
      bar_arrive(1, 128);
      bar_arrive(1, 128);
    }
  });
  rejects("a barrier with too few threads: deadlock, named", ErrorKind::Deadlock,
          "block (0,0,0) warps 0-2, 96 threads wait at named barrier 5: 96 of 128 threads have "
          "arrived (warps by mask: 7)",
          [] {
            if (threadIdx.x < 96) bar_sync(5, 128);
          });
  rejects("the report names each barrier", ErrorKind::Deadlock,
          "warps 2-3, 64 threads wait at named barrier 2: 64 of 128",
          [] { bar_sync(threadIdx.x < 64 ? 1 : 2, 128); });
  rejects("__syncthreads after an exit", kMisuse, "have exited", [] {
    if (threadIdx.x < 32) return;
    for (int i = 0; i < 1000; ++i) yield();
    __syncthreads();
  });
  rejects("exit in the middle of a phase", ErrorKind::ExitCheck,
          "the block exits in the middle of a barrier phase: named barrier 4: 64 of 128", [] {
            if (threadIdx.x < 64) bar_arrive(4, 128);
          });
}

// ---- the cluster barrier ------------------------------------------------------------------------

TEST(cluster_barriers) {
  for_each_schedule(4, [&] {
    uint32_t arrived[2] = {};
    launch({.grid = 8, .block = 64, .cluster = 4}, [&] {
      CHECK(cluster_rank() == blockIdx.x % 4);
      uint32_t& count = arrived[blockIdx.x / 4];
      for (uint32_t round = 1; round <= 3; ++round) {
        ++count;
        round == 2 ? cluster_arrive_relaxed() : cluster_arrive();
        if (round == 3 && threadIdx.x == 0) yield();
        cluster_wait();
        CHECK(count >= round * 256);
      }
    });
    launch({.grid = 2, .block = 64, .cluster = 2}, [&] {
      if (threadIdx.x >= 32) return;  // exited threads are not waited for
      sync_cluster();
    });
  });
  const auto rejects = rejecting({.grid = 2, .block = 64, .cluster = 2});
  rejects("wait without arrive", kMisuse, "without an arrive", [] { cluster_wait(); });
  rejects("arrive twice", kMisuse, "twice without", [] {
    cluster_arrive();
    cluster_arrive();
  });
  rejects("exit between arrive and wait", ErrorKind::ExitCheck,
          "between barrier.cluster.arrive and .wait", [] { cluster_arrive(); });
  rejects("a block that does not arrive: deadlock, named", ErrorKind::Deadlock,
          "cluster barrier of cluster 0: phase 0, 64 of 128 live threads",
          [] { blockIdx.x == 0 ? sync_cluster() : bar_sync(threadIdx.x < 32 ? 1 : 2, 64); });
}

// ---- distributed shared memory ------------------------------------------------------------------

__global__ void exchange(uint32_t* out, bool sync_before, bool sync_after) {
  auto* own = shared_array<uint32_t>();
  const uint32_t rank = cluster_rank(), peer = rank ^ 1;
  own[threadIdx.x] = 100 * rank + threadIdx.x;
  if (sync_before) sync_cluster();
  const uint32_t address = map_shared(4 * threadIdx.x, peer);
  out[rank * 64 + threadIdx.x] = load_shared_cluster<uint32_t>(address);
  store_shared_cluster<float>(map_shared(256 + 4 * threadIdx.x, peer), 0.5f);
  if (sync_after) sync_cluster();
}

TEST(distributed_shared_memory) {
  int early = 0, late = 0;
  GlobalBuffer<uint32_t> out(128, "out");
  const LaunchConfig pair = blocks_of(64, 512, 2);
  const auto diagnosed = [&](bool before, bool after, const char* text) {
    try {
      launch(pair, exchange, out.data(), before, after);
    } catch (const Error& error) {
      return std::string(error.what()).find(text) != std::string::npos;
    }
    return false;
  };
  for_each_schedule(8, [&] {
    out.fill(0);
    launch(pair, exchange, out.data(), true, true);
    for (uint32_t i = 0; i < 128; ++i) CHECK(out[i] == 100 * (1 - i / 64) + i % 64);
    early += diagnosed(false, true, "has not started");
    late += diagnosed(true, false, "has exited");
  });
  CHECK(early > 0 && late > 0);
}

// ---- setmaxnreg ---------------------------------------------------------------------------------

TEST(register_pool) {
  const auto run = [](uint32_t producer, uint32_t consumer, bool decrease) {
    launch({.grid = 1, .block = 384}, [=] {
      if (threadIdx.x >= 128)
        setmaxnreg_inc(consumer);
      else if (decrease)
        setmaxnreg_dec(producer);
    });
  };
  CHECK(default_registers(384, 65536) == 168);
  for_each_schedule(2, [&] { run(40, 232, true); });
  fails("24 + 2 x 248 do not: deadlock, named", ErrorKind::Deadlock,
        "registers are free in the block's pool; per thread, warpgroup 0 has 24",
        [&] { run(24, 248, true); });
  fails("no .dec: deadlock", ErrorKind::Deadlock,
        "setmaxnreg.inc: 0 registers are free in the block's pool; per thread, warpgroup 0 has 168",
        [&] { run(40, 232, false); });
  const auto rejects = rejecting({.grid = 1, .block = 384});
  rejects("a count of 36", kMisuse, "multiple of 8", [] { setmaxnreg_dec(36); });
  rejects("a count of 16", kMisuse, "24..256", [] { setmaxnreg_dec(16); });
  rejects(".dec to more", kMisuse, "has only 168", [] { setmaxnreg_dec(176); });
  rejects(".inc to less", kMisuse, "already has 168", [] { setmaxnreg_inc(40); });
  rejects("warps of one warpgroup with different counts", kMisuse, "of the same warpgroup",
          [] { setmaxnreg_dec(threadIdx.x < 32 ? 40 : 48); });
  rejects("only one warp of a warpgroup", ErrorKind::ExitCheck, "of the same warpgroup", [] {
    if (threadIdx.x < 32) setmaxnreg_dec(40);
  });
}
