// Named barriers, cluster barriers, setmaxnreg, and what deadlock reports and exit checks say about
// them.
#include "emulator/emulator.h"
#include "emulator/selftests/cases.h"

using namespace emulator::selftest;

using emulator::config;
using emulator::ErrorKind;
using emulator::launch;

// ---- named barriers -----------------------------------------------------------------------------

TEST(named_barriers) {
  bool right = true;
  for_each_schedule(4, [&] {
    int produced = 0, arrived[2] = {};
    launch({.grid = 2, .block = 128}, [&] {
      int& count = arrived[blockIdx.x];
      ++count;
      __syncthreads();
      right &= count == 128;
      __syncthreads();
      // Warps 0 and 1 meet at barrier 1 while 2 and 3 meet at barrier 2.
      ++count;
      emulator::bar_sync(1 + threadIdx.x / 64, 64);
      right &= count >= 128 + 64;
      __syncthreads();
      // Warp 0 waits for what the others only announce.
      if (threadIdx.x >= 32) {
        ++produced;
        emulator::bar_arrive(3, 128);
      } else {
        emulator::bar_sync(3, 128);
        right &= produced >= 96;
      }
    });
  });
  that(right, "bar.sync, bar.arrive and __syncthreads wait for everybody, under every schedule");
  passes("a last warp of 16 lanes takes part in __syncthreads",
         [] { launch({.grid = 1, .block = 48}, [] { __syncthreads(); }); });
}

TEST(named_barrier_misuse) {
  const auto rejects = [](const char* name, ErrorKind kind, const char* text, void (*kernel)()) {
    fails(name, kind, text, [&] { launch({.grid = 1, .block = 128}, kernel); });
  };
  rejects("barrier 16", ErrorKind::Misuse, "there are 16 barriers",
          [] { emulator::bar_sync(16, 128); });
  rejects("48 threads", ErrorKind::Misuse, "not a multiple of the warp size",
          [] { emulator::bar_sync(1, 48); });
  rejects("more threads than the block has", ErrorKind::Misuse, "the block has 128",
          [] { emulator::bar_sync(1, 160); });
  rejects("two counts in one phase", ErrorKind::Misuse, "others of this phase came with",
          [] { emulator::bar_sync(1, threadIdx.x < 64 ? 128 : 64); });
  rejects("a warp arrives twice in one phase", ErrorKind::Misuse, "arrives twice", [] {
    if (threadIdx.x < 32) {
      emulator::bar_arrive(1, 128);
      emulator::bar_arrive(1, 128);
    }
  });
  rejects("a barrier with too few threads: deadlock, named", ErrorKind::Deadlock,
          "block (0,0,0) warps 0-2, 96 threads wait at named barrier 5: 96 of 128 threads have "
          "arrived (warps by mask: 7)",
          [] {
            if (threadIdx.x < 96) emulator::bar_sync(5, 128);
          });
  rejects("the report names each barrier", ErrorKind::Deadlock,
          "warps 2-3, 64 threads wait at named barrier 2: 64 of 128",
          [] { emulator::bar_sync(threadIdx.x < 64 ? 1 : 2, 128); });
  rejects("__syncthreads after an exit", ErrorKind::Misuse, "have exited", [] {
    if (threadIdx.x < 32) return;
    for (int i = 0; i < 1000; ++i) emulator::yield();
    __syncthreads();
  });
  rejects("exit in the middle of a phase", ErrorKind::ExitCheck,
          "the block exits in the middle of a barrier phase: named barrier 4: 64 of 128", [] {
            if (threadIdx.x < 64) emulator::bar_arrive(4, 128);
          });
}

// ---- the cluster barrier ------------------------------------------------------------------------

TEST(cluster_barriers) {
  bool right = true;
  for_each_schedule(4, [&] {
    uint32_t arrived[2] = {};
    launch({.grid = 8, .block = 64, .cluster = 4}, [&] {
      right &= emulator::cluster_rank() == blockIdx.x % 4;
      uint32_t& count = arrived[blockIdx.x / 4];
      for (uint32_t round = 1; round <= 3; ++round) {
        ++count;
        if (round == 2)
          emulator::cluster_arrive_relaxed();
        else
          emulator::cluster_arrive();
        if (round == 3 && threadIdx.x == 0) emulator::yield();
        emulator::cluster_wait();
        right &= count >= round * 256;
      }
    });
    launch({.grid = 2, .block = 64, .cluster = 2}, [&] {
      if (threadIdx.x >= 32) return;  // exited threads are not waited for
      emulator::cluster_arrive();
      emulator::cluster_wait();
    });
  });
  that(right, "a cluster barrier waits for all threads of the cluster, under every schedule");
  const auto rejects = [](const char* name, ErrorKind kind, const char* text, void (*kernel)()) {
    fails(name, kind, text, [&] { launch({.grid = 2, .block = 64, .cluster = 2}, kernel); });
  };
  rejects("wait without arrive", ErrorKind::Misuse, "without an arrive",
          [] { emulator::cluster_wait(); });
  rejects("arrive twice", ErrorKind::Misuse, "twice without", [] {
    emulator::cluster_arrive();
    emulator::cluster_arrive();
  });
  rejects("exit between arrive and wait", ErrorKind::ExitCheck,
          "between barrier.cluster.arrive and .wait", [] { emulator::cluster_arrive(); });
  rejects("a block that does not arrive: deadlock, named", ErrorKind::Deadlock,
          "cluster barrier of cluster 0: phase 0, 64 of 128 live threads", [] {
            if (blockIdx.x == 0) {
              emulator::cluster_arrive();
              emulator::cluster_wait();
            } else if (threadIdx.x < 32)
              emulator::bar_sync(1, 64);
            else
              emulator::bar_sync(2, 64);
          });
}

// ---- distributed shared memory ------------------------------------------------------------------

__global__ void exchange(uint32_t* out, bool sync_before, bool sync_after) {
  auto* own = reinterpret_cast<uint32_t*>(emulator::dynamic_shared_memory());
  const uint32_t rank = emulator::cluster_rank(), peer = rank ^ 1;
  own[threadIdx.x] = 100 * rank + threadIdx.x;
  if (sync_before) {
    emulator::cluster_arrive();
    emulator::cluster_wait();
  }
  const uint32_t address = emulator::map_shared(4 * threadIdx.x, peer);
  out[rank * 64 + threadIdx.x] = emulator::load_shared_cluster<uint32_t>(address);
  emulator::store_shared_cluster<float>(emulator::map_shared(256 + 4 * threadIdx.x, peer), 0.5f);
  if (sync_after) {
    emulator::cluster_arrive();
    emulator::cluster_wait();
  }
}

TEST(distributed_shared_memory) {
  bool right = true;
  int early = 0, late = 0;
  emulator::GlobalBuffer<uint32_t> out(128, "out");
  const auto run = [&](bool before, bool after, int& diagnosed, const char* text) {
    try {
      launch({.grid = 2, .block = 64, .cluster = 2, .shared_bytes = 512}, exchange, out.data(),
             before, after);
    } catch (const emulator::Error& error) {
      diagnosed += std::string(error.what()).find(text) != std::string::npos;
    }
  };
  for_each_schedule(8, [&] {
    out.fill(0);
    int none = 0;
    run(true, true, none, "");
    right &= none == 0;
    for (uint32_t i = 0; i < 128; ++i) right &= out[i] == 100 * (1 - i / 64) + i % 64;
    run(false, true, early, "has not started");
    run(true, false, late, "has exited");
  });
  that(right, "load and store of a peer's shared memory, under every schedule");
  that(early > 0,
       "a peer that has not started is diagnosed (" + std::to_string(early) + " of 72 runs)");
  that(late > 0, "a peer that has exited is diagnosed (" + std::to_string(late) + " of 72 runs)");
}

// ---- setmaxnreg ---------------------------------------------------------------------------------

TEST(register_pool) {
  const auto run = [](uint32_t producer, uint32_t consumer, bool decrease) {
    launch({.grid = 1, .block = 384}, [=] {
      if (threadIdx.x >= 128)
        emulator::setmaxnreg_inc(consumer);
      else if (decrease)
        emulator::setmaxnreg_dec(producer);
    });
  };
  that(emulator::default_registers(384, 65536) == 168,
       "384 threads have 168 registers each by default");
  for_each_schedule(2, [&] { run(40, 232, true); });
  fails("24 + 2 x 248 do not: deadlock, named", ErrorKind::Deadlock,
        "registers are free in the block's pool; per thread, warpgroup 0 has 24",
        [&] { run(24, 248, true); });
  fails("no .dec: deadlock", ErrorKind::Deadlock,
        "setmaxnreg.inc: 0 registers are free in the block's pool; per thread, warpgroup 0 has 168",
        [&] { run(40, 232, false); });
  const auto rejects = [](const char* name, ErrorKind kind, const char* text, void (*kernel)()) {
    fails(name, kind, text, [&] { launch({.grid = 1, .block = 384}, kernel); });
  };
  rejects("a count of 36", ErrorKind::Misuse, "multiple of 8",
          [] { emulator::setmaxnreg_dec(36); });
  rejects("a count of 16", ErrorKind::Misuse, "24..256", [] { emulator::setmaxnreg_dec(16); });
  rejects(".dec to more", ErrorKind::Misuse, "has only 168", [] { emulator::setmaxnreg_dec(176); });
  rejects(".inc to less", ErrorKind::Misuse, "already has 168",
          [] { emulator::setmaxnreg_inc(40); });
  rejects("warps of one warpgroup with different counts", ErrorKind::Misuse,
          "of the same warpgroup", [] { emulator::setmaxnreg_dec(threadIdx.x < 32 ? 40 : 48); });
  rejects("only one warp of a warpgroup", ErrorKind::ExitCheck, "of the same warpgroup", [] {
    if (threadIdx.x < 32) emulator::setmaxnreg_dec(40);
  });
}
