// Checks a launch against the limits of the hardware, queues it, and runs a stream.
#include "emulator/machine/launch.h"

#include <algorithm>

#include "emulator/machine/residency.h"
#include "emulator/machine/scheduler.h"
#include "emulator/memory/global_memory.h"
#include "emulator/threads/registers.h"

namespace emulator {
namespace {

std::string text_of(const dim3& extent) {
  return format("(%u,%u,%u)", extent.x, extent.y, extent.z);
}

void require(bool holds, const char* expected, const std::string& came) {
  if (!holds) fail(ErrorKind::Misuse, "launch: %s; the launch has %s", expected, came.c_str());
}

// CUDA C++ Programming Guide, technical specifications per compute capability (9.0).
void check_limits(const LaunchConfig& launch) {
  const dim3 &grid = launch.grid, &block = launch.block, &cluster = launch.cluster;
  const uint64_t threads = uint64_t(block.x) * block.y * block.z;
  const uint64_t blocks_per_cluster = uint64_t(cluster.x) * cluster.y * cluster.z;
  require(grid.x >= 1 && grid.y >= 1 && grid.z >= 1 && grid.x < 1u << 31 && grid.y < 1u << 16 &&
              grid.z < 1u << 16,
          "a grid has 1 to 2^31-1, 65535, 65535 blocks", "grid " + text_of(grid));
  require(block.z <= 64 && threads >= 1 && threads <= kMaxThreadsPerBlock,
          "a block has 1 to 1024 threads, 64 at most in z", "block " + text_of(block));
  require(blocks_per_cluster >= 1 && blocks_per_cluster <= kMaxClusterBlocks,
          "a cluster has 1 to 8 blocks", "cluster " + text_of(cluster));
  require(grid.x % cluster.x == 0 && grid.y % cluster.y == 0 && grid.z % cluster.z == 0,
          "the grid is a multiple of the cluster",
          "grid " + text_of(grid) + ", cluster " + text_of(cluster));
  require(launch.shared_bytes <= config().shared_limit,
          format("a block has at most %u bytes of shared memory", config().shared_limit).c_str(),
          format("%u", launch.shared_bytes));
  const uint64_t warps = (threads + kWarpSize - 1) / kWarpSize;
  const uint64_t registers = (launch.registers_per_thread + 7) / 8 * 8;
  require(
      registers <= 256 && registers * warps * kWarpSize <= config().registers_per_sm,
      format("a block has at most %u registers, 255 per thread", config().registers_per_sm).c_str(),
      format("%u registers x %llu threads", launch.registers_per_thread,
             static_cast<unsigned long long>(threads)));
}

}  // namespace

DeviceKernels& device_kernels() {
  static DeviceKernels one;
  return one;
}

void Stream::enqueue(const LaunchConfig& launch_config, std::function<void()> body) {
  if (machine().current != nullptr) fail(ErrorKind::Misuse, "a kernel launched a kernel");
  check_limits(launch_config);
  auto grid = std::make_unique<Grid>();
  grid->launch = launch_config;
  const dim3 &extent = launch_config.grid, &cluster = launch_config.cluster,
             &block = launch_config.block;
  uint32_t& registers = grid->launch.registers_per_thread;
  if (registers == 0) {
    registers = default_registers(block.x * block.y * block.z, config().registers_per_sm);
  }
  registers = (registers + 7) / 8 * 8;
  grid->body = std::move(body);
  grid->index = static_cast<uint32_t>(queue_.size());
  grid->previous = queue_.empty() ? nullptr : queue_.back().get();
  grid->blocks_left = grid->blocks_to_signal = extent.x * extent.y * extent.z;
  grid->clusters_left = grid->blocks_to_signal / (cluster.x * cluster.y * cluster.z);
  grid->completion.grid = grid.get();
  queue_.push_back(std::move(grid));
}

void Stream::synchronize() {
  if (queue_.empty()) return;
  Machine& m = machine();
  m.config = config();
  m.rng.reseed(m.config.seed);
  m.grids = std::exchange(queue_, {});
  for (auto& grid : m.grids) {
    auto& order = grid->clusters_to_start;
    order.resize(grid->clusters_left);
    for (uint32_t i = 0; i < order.size(); ++i) {
      order[i] = i;
      std::swap(order[i], order[m.rng.below(i + 1)]);
    }
  }
  race_launch_begin();
  struct Cleanup {
    ~Cleanup() {
      clear_machine();
      race_launch_end();
    }
  };
  const Cleanup cleanup;
  run_machine();
  check_guard_zones();
}

}  // namespace emulator
