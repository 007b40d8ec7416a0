// The race checker and order between blocks and grids: flags, atomics, fences and their scopes,
// launches.
#include "emulator/selftests/race_kernels.h"

namespace emulator::selftest {
namespace {

// Block 0 produces, block 1 polls a flag and consumes.
void producer_and_consumer(const std::function<void(uint32_t*)>& publish,
                           const std::function<void(const uint32_t*)>& wait, uint32_t cluster = 1) {
  GlobalBuffer<uint32_t> flag(1, "flag"), data(32, "data"), result(32, "result");
  flag.fill(0);
  data.fill(0);
  launch(race_launch(2, 32, 1024, cluster), [&] {
    if (blockIdx.x == 0) {
      data[threadIdx.x] = threadIdx.x + 1;
      __syncthreads();
      if (threadIdx.x == 0) publish(flag.data());
    } else {
      if (threadIdx.x == 0) wait(flag.data());
      __syncthreads();
      result[threadIdx.x] = data[threadIdx.x];
    }
  });
}

uint32_t relaxed_load(const uint32_t* address) {
  return atomicAdd(const_cast<uint32_t*>(address), 0u);
}
void relaxed_store(uint32_t* address) { atomicExch(address, 1u); }

void relaxed_loop(const uint32_t* flag) {
  while (relaxed_load(flag) == 0) {
  }
}

TEST(release_and_acquire_order_blocks) {
  const auto run = [] {
    producer_and_consumer(
        [](uint32_t* flag) {
          missing("release") ? relaxed_store(flag) : store_release_gpu(flag, 1);
        },
        [](const uint32_t* flag) { missing("acquire") ? relaxed_loop(flag) : poll(flag); });
  };
  expect_clean(run);
  expect_race("release", "global buffer 'data'", run);
  expect_race("acquire", "global buffer 'data'", run);
}

TEST(release_of_an_atomic_add_orders_blocks) {
  const auto run = [] {
    producer_and_consumer(
        [](uint32_t* flag) {
          missing("release") ? void(atomic_add_relaxed_gpu(flag, 1))
                             : atomic_add_release_gpu(flag, 1);
        },
        [](const uint32_t* flag) { poll(flag); });
  };
  expect_clean(run);
  expect_race("release", "global buffer 'data'", run);
}

TEST(fences_around_relaxed_accesses_order_blocks) {
  const auto run = [] {
    producer_and_consumer(
        [](uint32_t* flag) {
          if (!missing("fence before store")) fence_acq_rel_gpu();
          relaxed_store(flag);
        },
        [](const uint32_t* flag) {
          if (missing("fence after load")) fence_acq_rel_gpu();
          relaxed_loop(flag);
          if (!missing("fence after load")) fence_acq_rel_gpu();
        });
  };
  expect_clean(run);
  expect_race("fence before store", "global buffer 'data'", run);
  expect_race("fence after load", "global buffer 'data'", run);
}

// A fence of cluster scope orders the blocks of one cluster, and no others.
TEST(scopes_of_fences_count) {
  const auto run = [](uint32_t cluster) {
    producer_and_consumer(
        [](uint32_t* flag) {
          fence_acq_rel_cluster();
          relaxed_store(flag);
        },
        [](const uint32_t* flag) {
          relaxed_loop(flag);
          fence_acq_rel_cluster();
        },
        cluster);
  };
  expect_clean([&] { run(2); });
  expect_race("", "global buffer 'data'", [&] { run(1); });
}

// Polling through volatile is no race, but it orders nothing without a fence.
TEST(volatile_polling) {
  const auto run = [] {
    producer_and_consumer([](uint32_t* flag) { store_release_gpu(flag, 1); },
                          [](const uint32_t* flag) {
                            const volatile uint32_t* polled = flag;
                            while (*polled == 0) yield();
                            if (!missing("fence")) __threadfence();
                          });
  };
  expect_clean(run, 4);
  expect_race("fence", "global buffer 'data'", run);
}

TEST(a_plain_flag_races) {
  CHECK_FAILS(ErrorKind::Race, "global buffer 'flag'",
              producer_and_consumer(
                  [](uint32_t* flag) {
                    fence_acq_rel_gpu();
                    *flag = 1;
                  },
                  [](const uint32_t* flag) { poll(flag); }));
}

TEST(atomics_do_not_race_with_atomics) {
  const auto run = [] {
    GlobalBuffer<uint32_t> sum(1, "sum");
    sum.fill(0);
    launch(race_launch(3, 64), [&] {
      atomicAdd(sum.data(), 1u);
      if (missing("atomic") && blockIdx.x == 1 && threadIdx.x == 5) sum[0] = 3;
    });
  };
  expect_clean(run, 4);
  expect_race("atomic", "an atomic access and a plain one", run);
}

// The last block to finish sums the partial results (the pattern of __threadfence's example in the
// CUDA C++ guide).
TEST(the_last_block_reduces) {
  const auto run = [] {
    constexpr uint32_t kBlocks = 4;
    GlobalBuffer<uint32_t> partial(kBlocks, "partial"), ticket(1, "ticket"), total(1, "total");
    ticket.fill(0);
    launch(race_launch(kBlocks, 64), [&] {
      if (threadIdx.x != 0) return;
      partial[blockIdx.x] = blockIdx.x;
      if (!missing("fence before ticket")) __threadfence();
      const bool last = atomicAdd(ticket.data(), 1u) == kBlocks - 1;
      if (!last) return;
      if (!missing("fence after ticket")) __threadfence();
      uint32_t sum = 0;
      for (uint32_t i = 0; i < kBlocks; ++i) sum += partial[i];
      total[0] = sum;
    });
    CHECK(total[0] == 6);
  };
  expect_clean(run);
  expect_race("fence before ticket", "global buffer 'partial'", run);
  expect_race("fence after ticket", "global buffer 'partial'", run);
}

TEST(grids_of_a_stream_are_ordered) {
  GlobalBuffer<int> data(64, "data");
  for_each_schedule(4, [&] {
    Stream stream;
    for (int grid = 0; grid < 3; ++grid)
      stream.launch(race_launch(2, 32), [&, grid] {
        const size_t at = (blockIdx.x * 32 + threadIdx.x + static_cast<uint32_t>(grid)) % 64;
        data[at] = grid ? data[at] + 1 : 1;
      });
    stream.synchronize();
  });
}

TEST(a_dependent_grid_waits_for_the_one_before) {
  const auto run = [] {
    GlobalBuffer<int> data(64, "data"), result(64, "result");
    data.fill(0);
    Stream stream;
    stream.launch(race_launch(2, 32), [&] {
      griddepcontrol_launch_dependents();
      data[blockIdx.x * 32 + threadIdx.x] = 1;
    });
    LaunchConfig dependent = race_launch(2, 32);
    dependent.programmatic_dependent = true;
    stream.launch(dependent, [&] {
      if (!missing("wait")) griddepcontrol_wait();
      result[blockIdx.x * 32 + threadIdx.x] = data[63 - (blockIdx.x * 32 + threadIdx.x)];
    });
    stream.synchronize();
  };
  expect_clean(run);
  expect_race("wait", "unordered", run);
}

// The first writes, the second waits for it and only then lets the third start; an ordinary grid
// follows them all because one block of the third waits for the second.
TEST(a_grid_two_behind_follows_what_was_waited_for) {
  const auto run = [] {
    GlobalBuffer<int> data(64, "data"), other(32, "other"), result(128, "result");
    data.fill(0), other.fill(0), result.fill(0);
    Stream stream;
    stream.launch(race_launch(2, 32), [&] { data[blockIdx.x * 32 + threadIdx.x] = 1; });
    LaunchConfig dependent = race_launch(1, 32);
    dependent.programmatic_dependent = true;
    stream.launch(dependent, [&] {
      if (missing("wait first")) griddepcontrol_launch_dependents();
      if (missing("wait before fence")) fence_acq_rel_gpu();
      if (!missing("wait")) griddepcontrol_wait();
      if (!missing("fence") && !missing("wait before fence")) fence_acq_rel_gpu();
      griddepcontrol_launch_dependents();
      other[threadIdx.x] = 1;
    });
    dependent.grid = dim3(2);
    stream.launch(dependent, [&] {
      const int mine = static_cast<int>(blockIdx.x * 32 + threadIdx.x);
      result[mine] = data[63 - mine];
      if (missing("own writes")) result[mine] += other[threadIdx.x];
      if (blockIdx.x == 0 && !missing("wait at the end")) griddepcontrol_wait();
    });
    stream.launch(race_launch(1, 32),
                  [&] { result[64 + threadIdx.x] = other[threadIdx.x] + result[threadIdx.x]; });
    stream.synchronize();
  };
  expect_clean(run);
  expect_race("wait", "unordered", run);
  expect_race("wait first", "unordered", run);
  expect_race("wait before fence", "unordered", run);
  expect_race("fence", "unordered", run);
  expect_race("own writes", "unordered", run);
  expect_race("wait at the end", "unordered", run);
}

// No race, but what only instrumented code shows: an access that a GPU does not make.
TEST(a_plain_access_is_aligned_to_its_size) {
  const auto run = [] {
    GlobalBuffer<uint16_t> halves(64, "halves");
    halves.fill(1);
    launch(race_launch(1, 8), [&] {
      const uint16_t* from = halves.data() + 2 * threadIdx.x + (missing("pair") ? 1 : 0);
      const uint32_t pair = *reinterpret_cast<const uint32_t*>(from);
      uint32_t copied;  // by parts, as a copy of bytes may be
      memcpy(&copied, halves.data() + 33, sizeof copied);
      halves[32 + threadIdx.x] = static_cast<uint16_t>(pair + (copied & 0));
    });
  };
  expect_clean(run);
  expect_fault("pair", ErrorKind::Misuse, "a plain load of 4 bytes", run);
}

}  // namespace
}  // namespace emulator::selftest
