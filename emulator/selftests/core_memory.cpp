// cp.async groups, flags between blocks, atomics, programmatic dependent launch, and asynchronous
// operations in general.
#include "emulator/selftests/kernels.h"

using namespace emulator;
using namespace emulator::selftest;

// ---- cp.async -----------------------------------------------------------------------------------

// Every thread copies 4 floats twice, in two groups, and looks at the first while the second is in
// flight. groups_left: 1 is right.
__global__ void two_stages(const float* in, float* out, uint32_t groups_left) {
  auto* shared = shared_array<float>();
  const uint32_t t = threadIdx.x;
  for (uint32_t stage = 0; stage < 2; ++stage) {
    cp_async_16(stage * 512 + 16 * t, in + stage * 128 + 4 * t, t < 30 ? 16 : 4);
    cp_async_commit_group();
  }
  cp_async_wait_group(groups_left);
  for (uint32_t i = 0; i < 4; ++i) out[4 * t + i] = shared[4 * t + i];
  cp_async_commit_group();
  cp_async_wait_group(0);
  for (uint32_t i = 0; i < 4; ++i) out[128 + 4 * t + i] = shared[128 + 4 * t + i];
}

TEST(copies) {
  GlobalBuffer<float> in(256, "in"), out(256, "out");
  for (uint32_t i = 0; i < 256; ++i) in[i] = float(i);
  const auto run = [&](uint32_t groups_left) {
    out.fill(-1);
    launch({.grid = 1, .block = 32, .shared_bytes = 1024}, two_stages, in.data(), out.data(),
           groups_left);
    for (uint32_t i = 0; i < 256; ++i) {
      const bool zero_filled = i % 128 >= 120 && i % 4 != 0;
      if (out[i] != (zero_filled ? 0.f : float(i))) return false;
    }
    return true;
  };
  for_each_schedule(2, [&] { CHECK(run(1)); });
  int wrong_count = 0;
  for_each_schedule(2, [&] { wrong_count += goes_wrong([&] { return run(2); }); });
  CHECK(wrong_count >= 6);  // reads poison: Late, Random
  const auto rejects = rejecting({.grid = 1, .block = 1, .shared_bytes = 1024});
  const float* p = in.data();
  rejects("a misaligned destination", kMisuse, "shared address 0x8 is not 16-byte aligned",
          [&] { cp_async_16(8, p, 16); });
  rejects("a misaligned source", kMisuse, "is not 16-byte aligned",
          [&] { cp_async_16(16, p + 1, 16); });
  rejects("a source size that exceeds the size", kMisuse, "src-size 17",
          [&] { cp_async_16(16, p, 17); });
  rejects("a source past the end of the buffer", kMisuse,
          "lie outside of the 1024 bytes of global buffer 'in'",
          [&] { cp_async_16(0, p + 256, 16); });
  rejects("a destination past the end", kMisuse, "lie outside", [&] { cp_async_16(1024, p, 16); });
  rejects("exit without a wait", ErrorKind::ExitCheck,
          "1 cp.async not waited for (0 of them not committed)", [&] {
            cp_async_16(0, p, 16);
            cp_async_commit_group();
          });
  rejects("exit without a commit", ErrorKind::ExitCheck, "(1 of them not committed)", [&] {
    cp_async_16(0, p, 16);
    cp_async_wait_group(0);
  });
}

// ---- flags and atomics --------------------------------------------------------------------------

TEST(flags) {
  GlobalBuffer<uint32_t> flag(4, "flag");
  for_each_schedule(8, [&] {
    flag.fill(0);
    uint32_t data = 0;
    launch({.grid = 4, .block = 32}, [&] {  // a chain of blocks: each waits for the one before it
      if (threadIdx.x == 0) {
        if (blockIdx.x > 0) poll(&flag[blockIdx.x - 1]);
        CHECK(data == blockIdx.x);
        ++data;
        store_release_gpu(&flag[blockIdx.x], 1);
      }
    });
    flag.fill(0);
    launch({.grid = 4, .block = 64}, [&] {  // all arrive, then one looks
      if (threadIdx.x == 0) atomic_add_release_gpu(&flag[0], 1);
      const uint32_t ticket = atomic_add_relaxed_gpu(&flag[1], 1);
      CHECK(ticket < 256);
      poll(&flag[0], 4);
    });
    CHECK(flag[0] == 4 && flag[1] == 256);
    flag.fill(0);
    launch({.grid = 2, .block = 64}, [&] {  // a spin lock around a counter
      while (atomicCAS(&flag[2], 0u, 1u) != 0) {
      }
      __threadfence();
      const uint32_t before = flag[3];
      yield();
      flag[3] = before + 1;
      __threadfence();
      atomicExch(&flag[2], 0u);
    });
    CHECK(flag[3] == 128);
    flag.fill(0);
    launch({.grid = 2, .block = 2},
           [&] {  // two flags polled in turn, of which only the other ever changes
             if (blockIdx.x == 0 && threadIdx.x == 0) {
               while (load_acquire_gpu(&flag[0]) == 0 && load_acquire_gpu(&flag[1]) == 0) {
               }
             } else if (blockIdx.x == 1) {
               for (int i = 0; i < 50; ++i) yield();
               store_release_gpu(&flag[1], 1);
             }
           });
  });
#if !defined(EMULATOR_RACE)   // which calls it a race
  for_each_schedule(2, [&] {  // a polling thread sees a plain store too
    flag.fill(0);
    launch({.grid = 2, .block = 1}, [&] { blockIdx.x == 0 ? poll(&flag[0]) : void(flag[0] = 1); });
  });
#endif
  const auto rejects = [&](const char* name, ErrorKind kind, const char* text,
                           std::function<void()> kernel) {
    flag.fill(0);
    fails(name, kind, text, [&] { launch({.grid = 2, .block = 64}, kernel); });
  };
  rejects("a flag that nobody sets: deadlock, named", ErrorKind::Deadlock,
          "block (0,0,0) warps 0-1, block (1,0,0) warp 0, 96 threads poll ld.acquire.gpu of flag + "
          "4 bytes, which holds 0",
          [&] {
            if (blockIdx.x == 0 || threadIdx.x < 32) poll(&flag[1]);
          });
  rejects("polling with a vote in the loop: deadlock", ErrorKind::Deadlock, "poll ld.acquire.gpu",
          [&] {
            while (!__all_sync(~0u, load_acquire_gpu(&flag[1]) != 0)) {
            }
          });
  rejects("polling with a barrier in the loop: deadlock", ErrorKind::Deadlock,
          "poll ld.acquire.gpu", [&] {
            for (bool done = false; !done;) {
              if (threadIdx.x == 0) done = load_acquire_gpu(&flag[1]) != 0;
              __syncthreads();
            }
          });
  rejects("a lock that is never released: deadlock", ErrorKind::Deadlock, "atomicCAS of flag", [&] {
    while (atomicCAS(&flag[2], 0u, 1u) != 0) {
    }
  });
  rejects("a flag out of bounds", kMisuse, "global buffer 'flag'",
          [&] { load_acquire_gpu(flag.data() + 4); });
}

TEST(atomics) {
  GlobalBuffer<uint32_t> u(4, "u");
  GlobalBuffer<float> f(2, "f");
  for_each_schedule(2, [&] {
    u.fill(0);
    f.fill(0);
    uint32_t in_shared = 0;
    launch({.grid = 2, .block = 64, .shared_bytes = 4}, [&] {
      atomicAdd(&u[0], 2u);
      atomicMax(&u[1], blockIdx.x * 64 + threadIdx.x);
      atomicAdd(&f[0], 0.5f);
      auto* counter = shared_array<uint32_t>();
      if (threadIdx.x == 0) *counter = 0;
      __syncthreads();
      atomicAdd(counter, 1u);
      __syncthreads();
      if (threadIdx.x == 0) in_shared += *counter;
    });
    CHECK(u[0] == 256 && u[1] == 127 && f[0] == 64.f && in_shared == 128);
  });
}

// ---- programmatic dependent launch --------------------------------------------------------------

struct DependentResult {
  bool saw_all = true;      // the second grid saw all that the first wrote
  bool overlapped = false;  // and some of its threads ran before the first was complete
};

DependentResult run_dependent(bool signal, bool wait, bool programmatic) {
  DependentResult result;
  GlobalBuffer<uint32_t> data(8 * 32, "data");
  data.fill(0);
  uint32_t finished = 0;
  Stream stream;
  stream.launch({.grid = 8, .block = 32}, [&, signal] {
    if (signal) griddepcontrol_launch_dependents();
    for (int i = 0; i < 20; ++i) __syncthreads();
    data[blockIdx.x * 32 + threadIdx.x] = 1;
    ++finished;
  });
  stream.launch({.grid = 2, .block = 32, .programmatic_dependent = programmatic}, [&, wait] {
    result.overlapped |= finished < 256;
    if (wait) griddepcontrol_wait();
    for (uint32_t i = 0; i < 256; ++i) result.saw_all &= data[i] == 1;
  });
  stream.synchronize();
  return result;
}

// Of three grids the second, launched with PDL, may wait for the first in one block of two; the
// third may wait for the second, or is an ordinary one.
bool third_follows_first(bool wait, bool early) {
  bool first_done = false, follows = true;
  Stream stream;
  stream.launch({.grid = 1, .block = 32}, [&] {
    griddepcontrol_launch_dependents();
    for (int i = 0; i < 50; ++i) __syncthreads();
    first_done = true;
  });
  stream.launch({.grid = 2, .block = 32, .programmatic_dependent = true}, [&] {
    if (wait && blockIdx.x == 0) griddepcontrol_wait();
  });
  stream.launch({.grid = 1, .block = 32, .programmatic_dependent = early}, [&] {
    griddepcontrol_wait();
    follows &= first_done;
  });
  stream.synchronize();
  return follows;
}

TEST(dependent_launch) {
  const KeepConfig keep;
  int overlapped = 0, wrong = 0;
  for_each_schedule(4, [&] {
    CHECK(run_dependent(false, false, false).saw_all);
    CHECK(!run_dependent(true, true, false).overlapped);
    CHECK(run_dependent(true, true, true).saw_all);
    overlapped += run_dependent(true, true, true).overlapped;
    wrong += goes_wrong([] { return run_dependent(true, false, true).saw_all; });
  });
  CHECK(overlapped > 0);
  CHECK(wrong > 0);  // without griddepcontrol.wait it sees too little
  int out_of_order = 0;
  for_each_schedule(2, [&] {
    CHECK(third_follows_first(true, false) && third_follows_first(true, true));
    out_of_order += !third_follows_first(false, false) || !third_follows_first(false, true);
  });
  CHECK(out_of_order > 0);
  config().resident_clusters = 1;
  run_dependent(true, true, true);
  launch({.grid = 1, .block = 32}, [] {  // without a grid before
    griddepcontrol_wait();
    griddepcontrol_launch_dependents();
  });
}

// ---- asynchronous operations --------------------------------------------------------------------

struct Event final : Waitable {
  bool happened = false;
  std::string describe() const override { return "event"; }
};

TEST(operations) {
  const KeepConfig keep;
  int at_once = 0, at_last = 0, orders[2] = {};
  for_each_schedule(4, [&] {
    std::vector<int> order;
    bool performed_early = false;
    launch({.grid = 1, .block = 32}, [&] {
      static Event events[2];
      if (threadIdx.x != 0) return;
      for (int i = 0; i < 2; ++i) {
        events[i].happened = false;
        engine_push(
            {.what = "operation", .touches = &current_thread().block(), .perform = [&order, i] {
               order.push_back(i);
               events[i].happened = true;
               wake_all(events[i]);
             }});
      }
      performed_early = events[1].happened;
      for (Event& event : events)
        if (!event.happened) block_on(event);
    });
    CHECK(order.size() == 2);
    if (config().completion == Completion::Early) at_once += performed_early;
    if (config().completion == Completion::Late) at_last += !performed_early;
    if (config().completion != Completion::Early) ++orders[order[0]];
  });
  CHECK(at_once == 12);  // of Early
  CHECK(at_last == 12);  // of Late: when nothing else can run
  CHECK(orders[0] > 0 && orders[1] > 0);
  config().completion = Completion::Late;
  const auto rejects = rejecting({.grid = 1, .block = 32});
  rejects("a block exits while an operation on its memory is in flight", ErrorKind::ExitCheck,
          "asynchronous operations on its shared memory are in flight: 1 x copy", [] {
            if (threadIdx.x == 0)
              engine_push({.what = "copy", .touches = &current_thread().block(), .perform = [] {}});
          });
  rejects("an operation fails: its issuer is named", kMisuse,
          "[copy issued by block (0,0,0) thread 7", [] {
            if (threadIdx.x == 7)
              engine_push({.what = "copy", .perform = [] { fail(kMisuse, "no"); }});
          });
  bool performed = false;
  launch({.grid = 1, .block = 1},
         [&] { engine_push({.what = "store", .perform = [&] { performed = true; }}); });
  CHECK(performed);  // it may outlive its block, not its grid
}
