// cp.async groups, flags between blocks, atomics, programmatic dependent launch, and asynchronous
// operations in general.
#include "emulator/emulator.h"
#include "emulator/selftests/cases.h"

using namespace emulator::selftest;

using emulator::config;
using emulator::ErrorKind;
using emulator::GlobalBuffer;
using emulator::launch;
using emulator::Stream;

// ---- cp.async -----------------------------------------------------------------------------------

struct CopyOptions {
  uint32_t groups_left = 1;  // the right number for `two_stages`
  bool commit = true;
  bool wait = true;
};

// Every thread copies 4 floats twice, in two groups, and looks at the first while the second is in
// flight.
__global__ void two_stages(const float* in, float* out, CopyOptions options) {
  auto* shared = reinterpret_cast<float*>(emulator::dynamic_shared_memory());
  const uint32_t t = threadIdx.x;
  for (uint32_t stage = 0; stage < 2; ++stage) {
    emulator::cp_async_16(stage * 512 + 16 * t, in + stage * 128 + 4 * t, t < 30 ? 16 : 4);
    if (options.commit) emulator::cp_async_commit_group();
  }
  if (options.wait) emulator::cp_async_wait_group(options.groups_left);
  for (uint32_t i = 0; i < 4; ++i) out[4 * t + i] = shared[4 * t + i];
  emulator::cp_async_commit_group();
  emulator::cp_async_wait_group(0);
  for (uint32_t i = 0; i < 4; ++i) out[128 + 4 * t + i] = shared[128 + 4 * t + i];
}

TEST(copies) {
  GlobalBuffer<float> in(256, "in"), out(256, "out");
  for (uint32_t i = 0; i < 256; ++i) in[i] = float(i);
  const auto run = [&](CopyOptions options) {
    out.fill(-1);
    launch({.grid = 1, .block = 32, .shared_bytes = 1024}, two_stages, in.data(), out.data(),
           options);
    for (uint32_t i = 0; i < 256; ++i) {
      const bool zero_filled = i % 128 >= 120 && i % 4 != 0;
      if (out[i] != (zero_filled ? 0.f : float(i))) return false;
    }
    return true;
  };
  bool right = true;
  for_each_schedule(2, [&] { right &= run({}); });
  that(right, "cp.async with zero fill, two groups, under every completion");
  int wrong_count = 0, no_wait = 0;
  for_each_schedule(2, [&] {
    wrong_count += goes_wrong([&] { return run({.groups_left = 2}); });
    no_wait += goes_wrong([&] { return run({.wait = false}); });
  });
  that(wrong_count >= 6, "a wait_group that leaves one group too many reads poison (Late, Random)");
  that(no_wait >= 6, "no wait_group reads poison (Late, Random)");
  const auto rejects = [&](const char* name, ErrorKind kind, const char* text,
                           std::function<void(const float*)> kernel) {
    fails(name, kind, text, [&] {
      launch({.grid = 1, .block = 1, .shared_bytes = 1024}, [&] { kernel(in.data()); });
    });
  };
  rejects("a misaligned destination", ErrorKind::Misuse,
          "shared address 0x8 is not 16-byte aligned",
          [](const float* p) { emulator::cp_async_16(8, p, 16); });
  rejects("a misaligned source", ErrorKind::Misuse, "is not 16-byte aligned",
          [](const float* p) { emulator::cp_async_16(16, p + 1, 16); });
  rejects("a source size that exceeds the size", ErrorKind::Misuse, "src-size 17",
          [](const float* p) { emulator::cp_async_16(16, p, 17); });
  rejects("a source past the end of the buffer", ErrorKind::Misuse,
          "lie outside of the 1024 bytes of global buffer 'in'",
          [](const float* p) { emulator::cp_async_16(0, p + 256, 16); });
  rejects("a destination past the end", ErrorKind::Misuse, "lie outside",
          [](const float* p) { emulator::cp_async_16(1024, p, 16); });
  rejects("exit without a wait", ErrorKind::ExitCheck,
          "1 cp.async not waited for (0 of them not committed)", [](const float* p) {
            emulator::cp_async_16(0, p, 16);
            emulator::cp_async_commit_group();
          });
  rejects("exit without a commit", ErrorKind::ExitCheck, "(1 of them not committed)",
          [](const float* p) {
            emulator::cp_async_16(0, p, 16);
            emulator::cp_async_wait_group(0);
          });
}

// ---- flags and atomics --------------------------------------------------------------------------

TEST(flags) {
  GlobalBuffer<uint32_t> flag(4, "flag");
  bool right = true;
  for_each_schedule(8, [&] {
    flag.fill(0);
    uint32_t data = 0;
    launch({.grid = 4, .block = 32}, [&] {  // a chain of blocks: each waits for the one before it
      if (threadIdx.x == 0) {
        if (blockIdx.x > 0)
          while (emulator::load_acquire_gpu(&flag[blockIdx.x - 1]) != 1) {
          }
        right &= data == blockIdx.x;
        ++data;
        emulator::store_release_gpu(&flag[blockIdx.x], 1);
      }
    });
    flag.fill(0);
    launch({.grid = 4, .block = 64}, [&] {  // all arrive, then one looks
      if (threadIdx.x == 0) emulator::atomic_add_release_gpu(&flag[0], 1);
      const uint32_t ticket = emulator::atomic_add_relaxed_gpu(&flag[1], 1);
      right &= ticket < 256;
      while (emulator::load_acquire_gpu(&flag[0]) < 4) {
      }
    });
    right &= flag[0] == 4 && flag[1] == 256;
    flag.fill(0);
    launch({.grid = 2, .block = 64}, [&] {  // a spin lock around a counter
      while (atomicCAS(&flag[2], 0u, 1u) != 0) {
      }
      __threadfence();
      const uint32_t before = flag[3];
      emulator::yield();
      flag[3] = before + 1;
      __threadfence();
      atomicExch(&flag[2], 0u);
    });
    right &= flag[3] == 128;
    flag.fill(0);
    launch({.grid = 2, .block = 2},
           [&] {  // two flags polled in turn, of which only the other ever changes
             if (blockIdx.x == 0 && threadIdx.x == 0) {
               while (emulator::load_acquire_gpu(&flag[0]) == 0 &&
                      emulator::load_acquire_gpu(&flag[1]) == 0) {
               }
             } else if (blockIdx.x == 1) {
               for (int i = 0; i < 50; ++i) emulator::yield();
               emulator::store_release_gpu(&flag[1], 1);
             }
           });
  });
  that(
      right,
      "acquire and release flags, tickets, a spin lock and two polled flags, under every schedule");
#if !defined(EMULATOR_RACE)  // which calls it a race
  bool polled_plain_store = false;
  for_each_schedule(2, [&] {
    flag.fill(0);
    launch({.grid = 2, .block = 1}, [&] {
      if (blockIdx.x == 0)
        while (emulator::load_acquire_gpu(&flag[0]) == 0) {
        }
      else
        flag[0] = 1;
    });
    polled_plain_store = true;
  });
  that(polled_plain_store, "a polling thread sees a plain store too");
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
            if (blockIdx.x == 1 && threadIdx.x >= 32) return;
            while (emulator::load_acquire_gpu(&flag[1]) == 0) {
            }
          });
  rejects("polling with a vote in the loop: deadlock", ErrorKind::Deadlock, "poll ld.acquire.gpu",
          [&] {
            while (!__all_sync(~0u, emulator::load_acquire_gpu(&flag[1]) != 0)) {
            }
          });
  rejects("polling with a barrier in the loop: deadlock", ErrorKind::Deadlock,
          "poll ld.acquire.gpu", [&] {
            for (bool done = false; !done;) {
              if (threadIdx.x == 0) done = emulator::load_acquire_gpu(&flag[1]) != 0;
              __syncthreads();
            }
          });
  rejects("a lock that is never released: deadlock", ErrorKind::Deadlock, "atomicCAS of flag", [&] {
    while (atomicCAS(&flag[2], 0u, 1u) != 0) {
    }
  });
  rejects("a flag out of bounds", ErrorKind::Misuse, "global buffer 'flag'",
          [&] { emulator::load_acquire_gpu(flag.data() + 4); });
}

TEST(atomics) {
  GlobalBuffer<uint32_t> u(4, "u");
  GlobalBuffer<float> f(2, "f");
  bool right = true;
  for_each_schedule(2, [&] {
    u.fill(0);
    f.fill(0);
    uint32_t in_shared = 0;
    launch({.grid = 2, .block = 64, .shared_bytes = 4}, [&] {
      atomicAdd(&u[0], 2u);
      atomicMax(&u[1], blockIdx.x * 64 + threadIdx.x);
      atomicAdd(&f[0], 0.5f);
      auto* counter = reinterpret_cast<uint32_t*>(emulator::dynamic_shared_memory());
      if (threadIdx.x == 0) *counter = 0;
      __syncthreads();
      atomicAdd(counter, 1u);
      __syncthreads();
      if (threadIdx.x == 0) in_shared += *counter;
    });
    right &= u[0] == 256 && u[1] == 127 && f[0] == 64.f && in_shared == 128;
  });
  that(right, "atomics on global and shared memory");
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
    if (signal) emulator::griddepcontrol_launch_dependents();
    for (int i = 0; i < 20; ++i) __syncthreads();
    data[blockIdx.x * 32 + threadIdx.x] = 1;
    ++finished;
  });
  stream.launch({.grid = 2, .block = 32, .programmatic_dependent = programmatic}, [&, wait] {
    result.overlapped |= finished < 256;
    if (wait) emulator::griddepcontrol_wait();
    for (uint32_t i = 0; i < 256; ++i) result.saw_all &= data[i] == 1;
  });
  stream.synchronize();
  return result;
}

// Of three grids the second, which begins early, may wait for the first in one block of two; and
// the third for the second, or it is an ordinary one.
bool third_follows_first(bool wait, bool early) {
  bool first_done = false, follows = true;
  Stream stream;
  stream.launch({.grid = 1, .block = 32}, [&] {
    emulator::griddepcontrol_launch_dependents();
    for (int i = 0; i < 50; ++i) __syncthreads();
    first_done = true;
  });
  stream.launch({.grid = 2, .block = 32, .programmatic_dependent = true}, [&] {
    if (wait && blockIdx.x == 0) emulator::griddepcontrol_wait();
  });
  stream.launch({.grid = 1, .block = 32, .programmatic_dependent = early}, [&] {
    emulator::griddepcontrol_wait();
    follows &= first_done;
  });
  stream.synchronize();
  return follows;
}

TEST(dependent_launch) {
  const KeepConfig keep;
  int overlapped = 0, wrong = 0;
  bool right = true;
  for_each_schedule(4, [&] {
    right &= run_dependent(false, false, false).saw_all;
    right &= !run_dependent(true, true, false).overlapped;
    right &= run_dependent(true, true, true).saw_all;
    overlapped += run_dependent(true, true, true).overlapped;
    wrong += goes_wrong([] { return run_dependent(true, false, true).saw_all; });
  });
  that(right, "grids of a stream run in order; griddepcontrol.wait waits for the grid before");
  that(overlapped > 0,
       "a programmatic dependent overlaps (" + std::to_string(overlapped) + " of 36 runs)");
  that(wrong > 0,
       "without griddepcontrol.wait it sees too little (" + std::to_string(wrong) + " of 36 runs)");
  int in_order = 0, out_of_order = 0, runs = 0;
  for_each_schedule(2, [&] {
    in_order += third_follows_first(true, false) && third_follows_first(true, true);
    out_of_order += !third_follows_first(false, false) || !third_follows_first(false, true);
    ++runs;
  });
  that(in_order == runs, "where one block of the second grid waits, the third follows the first");
  that(out_of_order > 0, "where none waits, it need not (" + std::to_string(out_of_order) + " of " +
                             std::to_string(runs) + " runs)");
  config().resident_clusters = 1;
  passes("a dependent with one resident cluster", [] { run_dependent(true, true, true); });
  config().resident_clusters = 0;
  passes("griddepcontrol without a grid before", [] {
    launch({.grid = 1, .block = 32}, [] {
      emulator::griddepcontrol_wait();
      emulator::griddepcontrol_launch_dependents();
    });
  });
}

// ---- asynchronous operations --------------------------------------------------------------------

struct Event final : emulator::Waitable {
  bool happened = false;
  std::string describe() const override { return "event"; }
};

TEST(operations) {
  const KeepConfig keep;
  int at_once = 0, at_last = 0, orders[2] = {};
  bool right = true;
  for_each_schedule(4, [&] {
    std::vector<int> order;
    bool performed_early = false;
    launch({.grid = 1, .block = 32}, [&] {
      static Event events[2];
      if (threadIdx.x != 0) return;
      for (int i = 0; i < 2; ++i) {
        events[i].happened = false;
        emulator::engine_push({.what = "operation",
                               .touches = &emulator::current_thread().block(),
                               .perform = [&order, i] {
                                 order.push_back(i);
                                 events[i].happened = true;
                                 emulator::wake_all(events[i]);
                               }});
      }
      performed_early = events[1].happened;
      for (Event& event : events)
        if (!event.happened) emulator::block_on(event);
    });
    right &= order.size() == 2;
    if (config().completion == emulator::Completion::Early) at_once += performed_early;
    if (config().completion == emulator::Completion::Late) at_last += !performed_early;
    if (config().completion != emulator::Completion::Early) ++orders[order[0]];
  });
  that(right, "asynchronous operations are performed once");
  that(at_once == 12, "Early performs them at once");
  that(at_last == 12, "Late performs them when nothing else can run");
  that(orders[0] > 0 && orders[1] > 0, "in either order");
  config().completion = emulator::Completion::Late;
  fails(
      "a block exits while an operation on its memory is in flight", ErrorKind::ExitCheck,
      "asynchronous operations on its shared memory are in flight: 1 x copy", [] {
        launch({.grid = 1, .block = 32}, [] {
          if (threadIdx.x == 0)
            emulator::engine_push(
                {.what = "copy", .touches = &emulator::current_thread().block(), .perform = [] {}});
        });
      });
  fails("an operation fails: its issuer is named", ErrorKind::Misuse,
        "[copy issued by block (0,0,0) thread 7", [] {
          launch({.grid = 1, .block = 32}, [] {
            if (threadIdx.x == 7)
              emulator::engine_push(
                  {.what = "copy", .perform = [] { emulator::fail(ErrorKind::Misuse, "no"); }});
          });
        });
  bool performed = false;
  launch({.grid = 1, .block = 1},
         [&] { emulator::engine_push({.what = "store", .perform = [&] { performed = true; }}); });
  that(performed, "an operation that touches no shared memory may outlive its block, not its grid");
}
