// What self-tests with kernels share: launches under every schedule, and pieces of kernels.
#pragma once
#include <functional>
#include <initializer_list>
#include <string>

#include "emulator/emulator.h"
#include "emulator/selftests/selftest.h"

namespace emulator::selftest {

constexpr auto kMisuse = ErrorKind::Misuse;
constexpr Schedule kSchedules[] = {Schedule::RunAhead, Schedule::Random, Schedule::Priority};
constexpr Completion kCompletions[] = {Completion::Early, Completion::Late, Completion::Random};

// Restores the configuration.
struct KeepConfig {
  Config before = config();
  ~KeepConfig() { config() = before; }
};

// Calls `body` under every schedule and completion, with `seeds` seeds each.
inline void for_each_schedule(uint64_t seeds, const std::function<void()>& body) {
  const KeepConfig keep;
  for (const Schedule schedule : kSchedules) {
    for (const Completion completion : kCompletions) {
      for (uint64_t seed = 1; seed <= seeds; ++seed) {
        config() = {.seed = seed, .schedule = schedule, .completion = completion};
        config().watchdog_seconds = 20;
        body();
      }
    }
  }
}

// Under every completion, with the one schedule that is set.
inline void for_each_completion(const std::function<void()>& body) {
  const KeepConfig keep;
  for (const Completion completion : kCompletions) {
    config().completion = completion;
    body();
  }
}

// Whether `body` either returns false or fails: a race build diagnoses what others see as a wrong
// result.
inline bool goes_wrong(const std::function<bool()>& body) {
  try {
    return !body();
  } catch (const Error&) {
    return true;
  }
}

// Blocks of one cluster.
inline LaunchConfig blocks_of(uint32_t threads, uint32_t shared_bytes, uint32_t blocks = 1) {
  return {.grid = blocks, .block = threads, .cluster = blocks, .shared_bytes = shared_bytes};
}

// `check` runs on the host after each launch.
inline void run_everywhere(
    const LaunchConfig& launch_config, const std::function<void()>& kernel,
    const std::function<void()>& check = [] {}, uint64_t seeds = 3) {
  for_each_schedule(seeds, [&] {
    launch(launch_config, kernel);
    check();
  });
}

// Expects launches to fail, each with its own message: rejects(message, kind, text, kernel).
inline auto rejecting(const LaunchConfig& launch_config) {
  return [=](const std::string& name, ErrorKind kind, const char* text,
             const std::function<void()>& kernel) {
    fails(name, kind, text, [&] { launch(launch_config, kernel); });
  };
}

template <class T>
T* shared_array(uint32_t offset = 0) {
  return reinterpret_cast<T*>(dynamic_shared_memory() + offset);
}

// Polls until the flag is set, or reaches `least`.
inline void poll(const uint32_t* flag, uint32_t least = 1) {
  while (load_acquire_gpu(flag) < least) {
  }
}

inline void sync_cluster() {
  cluster_arrive();
  cluster_wait();
}

// Boxes [rows, columns] of a row-major tensor [height, width], whose rows are `pitch` bytes apart.
inline CUtensorMap tensor_map(void* base, CUtensorMapDataType type, Swizzle swizzle, uint32_t width,
                              uint32_t height, uint32_t pitch, uint32_t columns, uint32_t rows) {
  const cuuint64_t dims[] = {width, height}, strides[] = {pitch};
  const cuuint32_t box[] = {columns, rows}, element_strides[] = {1, 1};
  CUtensorMap map;
  CHECK(encode_tensor_map_tiled(
            &map, type, 2, base, dims, strides, box, element_strides, CU_TENSOR_MAP_INTERLEAVE_NONE,
            static_cast<CUtensorMapSwizzle>(swizzle), CU_TENSOR_MAP_L2_PROMOTION_NONE,
            CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS);
  return map;
}

// Waits, without synchronising, until the block of that rank has exited.
inline void wait_until_exited(uint32_t rank) {
  const Block& peer = *current_thread().block().cluster->blocks[rank];
  while (peer.state != BlockState::Exited) yield();
}

// One thread initialises mbarriers at `first`, `first` + 8, ...
inline void init_mbarriers_alone(uint32_t first, std::initializer_list<uint32_t> counts) {
  for (const uint32_t count : counts) {
    mbarrier_init(first, count);
    first += 8;
  }
  fence_mbarrier_init();
}

// The first thread initialises them, and publishes them to its block, or to the cluster.
inline void init_mbarriers(uint32_t first, std::initializer_list<uint32_t> counts) {
  if (threadIdx.x == 0) init_mbarriers_alone(first, counts);
  syncthreads();
}
inline void init_mbarriers_of_cluster(uint32_t first, std::initializer_list<uint32_t> counts) {
  if (threadIdx.x == 0) init_mbarriers_alone(first, counts);
  sync_cluster();
}

}  // namespace emulator::selftest
