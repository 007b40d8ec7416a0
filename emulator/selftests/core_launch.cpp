// Launch limits, indices, residency, block order, guard zones, exit of blocks, and the watchdog.
#include <set>

#include "emulator/selftests/kernels.h"

using namespace emulator;
using namespace emulator::selftest;

__global__ void write_indices(uint32_t* out) {
  const uint32_t block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  const uint32_t thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  out[block * blockDim.x * blockDim.y * blockDim.z + thread] = block * 1000 + thread;
}

TEST(indices) {
  GlobalBuffer<uint32_t> out(3 * 2 * 2 * 30, "out");
  for_each_schedule(2, [&] {
    out.fill(0);
    launch({.grid = dim3(3, 2, 2), .block = dim3(5, 3, 2)}, write_indices, out.data());
    for (uint32_t i = 0; i < out.size(); ++i) CHECK(out[i] == i / 30 * 1000 + i % 30);
  });
}

TEST(limits) {
  const auto nothing = [] {};
  const auto rejects = [&](const char* name, const LaunchConfig& c, const char* text) {
    fails(name, kMisuse, text, [&] { launch(c, nothing); });
  };
  rejects("1025 threads", {.grid = 1, .block = 1025}, "1 to 1024 threads");
  rejects("no blocks", {.grid = 0, .block = 32}, "a grid has");
  rejects("65 threads in z", {.grid = 1, .block = dim3(1, 1, 65)}, "64 at most in z");
  rejects("cluster of 16", {.grid = 16, .block = 32, .cluster = 16}, "1 to 8 blocks");
  rejects("grid not a multiple of the cluster", {.grid = 3, .block = 32, .cluster = 2},
          "multiple of the cluster");
  rejects("228 KiB of shared memory", {.grid = 1, .block = 32, .shared_bytes = 228 * 1024},
          "shared memory");
  rejects("384 threads of 176 registers", {.grid = 1, .block = 384, .registers_per_thread = 176},
          "registers");
  launch({.grid = 1, .block = 384, .registers_per_thread = 168}, nothing);
  fails("a launch inside a kernel", kMisuse, "launched a kernel", [&] {
    launch({.grid = 1, .block = 1}, [&] { launch({.grid = 1, .block = 1}, nothing); });
  });
  fails("an instruction outside of a kernel", kMisuse, "outside of a kernel", [] { lane_index(); });
}

// With one resident cluster blocks run one after the other, in an order that depends on the seed.
TEST(block_order) {
  const KeepConfig keep;
  std::set<std::vector<uint32_t>> orders;
  config().resident_clusters = 1;
  for (config().seed = 1; config().seed <= 8; ++config().seed) {
    std::vector<uint32_t> order;
    launch({.grid = 4, .block = 32}, [&] {
      if (threadIdx.x == 0) order.push_back(blockIdx.x);
      __syncthreads();
    });
    orders.insert(order);
  }
  CHECK(orders.size() > 3);
}

TEST(residency) {
  const KeepConfig keep;
  uint32_t most = 0, running = 0;
  for (const uint32_t resident : {1u, 2u, 0u}) {
    config().resident_clusters = resident;
    most = running = 0;
    launch({.grid = 8, .block = 32, .cluster = 2}, [&] {
      if (threadIdx.x == 0) most = std::max(most, ++running);
      for (int i = 0; i < 100; ++i) __syncthreads();
      if (threadIdx.x == 0) --running;
    });
    CHECK(most <= (resident == 0 ? 8 : 2 * resident));
    CHECK(most > 2 || resident == 1);
  }
}

// A block that waits for one that comes later in the order needs both to be resident.
TEST(blocks_that_wait_for_others) {
  const KeepConfig keep;
  GlobalBuffer<uint32_t> flag(std::vector<uint32_t>{0}, "flag");
  const auto wait_for_block_1 = [&] {
    blockIdx.x == 0 ? poll(flag.data()) : store_release_gpu(flag.data(), 1);
  };
  launch({.grid = 2, .block = 1}, wait_for_block_1);
  bool deadlocked = false;
  config().resident_clusters = 1;
  for (config().seed = 1; config().seed <= 8; ++config().seed) {
    flag[0] = 0;
    try {
      launch({.grid = 2, .block = 1}, wait_for_block_1);
    } catch (const Error& error) {
      const std::string message = error.what();
      deadlocked =
          error.kind == ErrorKind::Deadlock &&
          message.find("1 clusters have not started") != std::string::npos &&
          message.find("ld.acquire.gpu of flag + 0 bytes, which holds 0") != std::string::npos;
    }
  }
  CHECK(deadlocked);
}

TEST(memory_bounds) {
#if !defined(__SANITIZE_ADDRESS__)  // which reports these itself, and ends the process
  fails("a write past dynamic shared memory", kMisuse, "bytes of shared memory", [] {
    launch({.grid = 1, .block = 1, .shared_bytes = 100}, [] { dynamic_shared_memory()[100] = 0; });
  });
  for (const int offset : {-1, 10}) {
    GlobalBuffer<uint32_t> x(10, "x");
    fails("a write at " + std::to_string(offset) + " of a buffer of 10", kMisuse,
          "global buffer 'x'",
          [&] { launch({.grid = 1, .block = 1}, [&] { x.data()[offset] = 0; }); });
  }
#endif
  GlobalBuffer<uint32_t> poisoned(4, "poisoned");
  CHECK(poisoned[3] == 0xffffffffu);
#if !defined(EMULATOR_RACE)  // which calls it a read of uninitialised memory
  launch({.grid = 1, .block = 1, .shared_bytes = 16},
         [] { CHECK(shared_array<uint32_t>()[0] == 0xffffffffu); });
#endif
  CHECK(find_global(poisoned.data() + 3) != nullptr && find_global(poisoned.data() + 4) == nullptr);
  uint32_t own[4];
  register_global(own, sizeof own, "own");
  CHECK(find_global(own)->name == "own");
  unregister_global(own);
  CHECK(find_global(own) == nullptr);
}

TEST(shared_addresses) {
  const auto rejects = rejecting({.grid = 2, .block = 1, .cluster = 2, .shared_bytes = 64});
  rejects("a misaligned shared address", kMisuse, "not 4-byte aligned",
          [] { load_shared_cluster<uint32_t>(2); });
  rejects("a shared address out of bounds", kMisuse, "lie outside",
          [] { load_shared_cluster<uint32_t>(64); });
  rejects("a generic pointer that is not shared", kMisuse, "does not point into", [] {
    int x = 0;
    shared_address(&x);
  });
  rejects("mapa of rank 2 in a cluster of 2", kMisuse, "rank 2", [] { map_shared(0, 2); });
  rejects("an instruction for the own block with a peer's address", kMisuse,
          "reaches its own block only",
          [] { own_shared(map_shared(0, 1 - cluster_rank()), 4, 4, "ldmatrix"); });
  launch({.grid = 1, .block = 1, .shared_bytes = 64},  // the end's address is allowed
         [] { CHECK(shared_address(dynamic_shared_memory() + 64) == 64); });
}

int recurse(volatile int* depth) {
  volatile char frame[1024] = {};
  *depth = *depth + 1;
  if (*depth > 1 << 20) return 0;
  return recurse(depth) + frame[*depth % 1024];
}

TEST(wild_accesses) {
#if !defined(__SANITIZE_ADDRESS__)  // which reports these itself, and ends the process
  GlobalBuffer<uint32_t> x(1024, "x");
  uint32_t* data = x.data();
  const auto rejects = [&](const char* name, const char* text, std::function<void()> kernel) {
    fails(name, kMisuse, text, [&] {
      launch({.grid = 1, .block = 64, .shared_bytes = 4096}, [&] {
        __syncthreads();
        if (threadIdx.x == 33) kernel();
        __syncthreads();
      });
    });
  };
  rejects("a null pointer", "near no buffer", [] { *static_cast<volatile int*>(nullptr) = 0; });
  rejects("far past a buffer", "offset 8192 of the 4096 bytes of global buffer 'x'",
          [=] { data[2048] = 0; });
  rejects("the page after shared memory", "offset 4096 of the block's 4096 bytes of shared memory",
          [] { dynamic_shared_memory()[4096] = 0; });
  rejects("it names the thread", "[block (0,0,0) thread 33 = warp 1 lane 1;",
          [=] { data[2048] = 0; });
  rejects("a stack that overflows", "raise Config::stack_bytes", [] {
    volatile int depth = 0;
    recurse(&depth);
  });
  launch({.grid = 1, .block = 64}, [] { __syncthreads(); });
#endif
}

TEST(replay) {
  const KeepConfig keep;
  const auto trace = [](uint64_t seed) {
    config().seed = seed;
    std::vector<uint32_t> order;
    launch({.grid = 2, .block = 128}, [&] {
      for (int i = 0; i < 4; ++i) {
        order.push_back(blockIdx.x * 128 + threadIdx.x);
        __syncthreads();
      }
    });
    return order;
  };
  CHECK(trace(5) == trace(5));
  CHECK(trace(5) != trace(6));
}

TEST(watchdog) {
  const KeepConfig keep;
  config().watchdog_seconds = 0.2;
  static volatile int never = 0;
  const auto rejects = rejecting({.grid = 1, .block = 64});
  rejects("a thread that spins on plain memory", ErrorKind::Watchdog, "without letting others run",
          [] {
            if (threadIdx.x == 3)
              while (never == 0) {
              }
          });
  rejects("an endless loop with barriers", ErrorKind::Watchdog, "more than 0.2 seconds", [] {
    while (never == 0) __syncthreads();
  });
  config().watchdog_seconds = 60;
  launch({.grid = 1, .block = 64}, [] { __syncthreads(); });
}
