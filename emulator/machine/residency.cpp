// From the start of a cluster to its end: creating blocks and fibers, exit checks, completing
// grids.
#include "emulator/machine/residency.h"

#include <algorithm>
#include <map>

#include "emulator/copies/cp_async.h"
#include "emulator/counts/counters.h"
#include "emulator/machine/schedule_policy.h"
#include "emulator/machine/scheduler.h"
#include "emulator/memory/shared_memory.h"
#include "emulator/threads/cluster.h"
#include "emulator/threads/grid_dependency.h"
#include "emulator/threads/registers.h"

namespace emulator {
namespace {

uint32_t volume(const dim3& extent) { return extent.x * extent.y * extent.z; }

uint3 unflatten(uint32_t index, const dim3& extent) {
  return {index % extent.x, index / extent.x % extent.y, index / (extent.x * extent.y)};
}

// ---- start --------------------------------------------------------------------------------------

// The first and last function of every fiber.
void fiber_main() {
  fiber_entered();
  Machine& m = machine();
  Thread& self = *m.current;
  const Grid& grid = self.block().grid();
  try {
    race_thread_begin(self);
    acquire_at_start(grid);
    grid.body();
    thread_exits(self);
  } catch (...) {
    m.failure = std::current_exception();
    m.current_operation = nullptr;
  }
  if (m.failure) switch_context(self.context, m.scheduler, /*last=*/true);
  suspend();
}

std::unique_ptr<Block> make_block(Cluster& cluster, uint32_t rank, const uint3& first_index) {
  Machine& m = machine();
  const LaunchConfig& launch = cluster.grid->launch;
  auto block = std::make_unique<Block>();
  block->cluster = &cluster;
  block->rank = rank;
  const uint3 offset = unflatten(rank, launch.cluster);
  block->index = {first_index.x + offset.x, first_index.y + offset.y, first_index.z + offset.z};
  block->thread_count = block->live_threads = volume(launch.block);
  block->threads = std::make_unique<Thread[]>(block->thread_count);
  for (uint32_t i = 0; i < kNamedBarriers; ++i) block->barriers[i].index = i;
  block->registers.block = block.get();
  const uint32_t warp_count = (block->thread_count + kWarpSize - 1) / kWarpSize;
  for (uint32_t w = 0; w < warp_count; ++w) {
    auto warp = std::make_unique<Warp>();
    warp->block = block.get();
    warp->index = w;
    warp->registers = launch.registers_per_thread;
    warp->priority = draw_priority();
    warp->rotation = m.rng.below(kWarpSize);
    for (Collective& collective : warp->collectives) collective.warp = warp.get();
    for (uint32_t lane = 0; lane < kWarpSize; ++lane) {
      const uint32_t linear = w * kWarpSize + lane;
      if (linear >= block->thread_count) break;
      Thread& thread = block->threads[linear];
      thread.warp = warp.get();
      thread.linear = linear;
      thread.lane = lane;
      thread.index = unflatten(linear, launch.block);
      warp->threads[lane] = &thread;
      warp->lanes |= 1u << lane;
    }
    warp->alive = warp->lanes;
    block->warps.push_back(std::move(warp));
  }
  take_shared_memory(*block, launch.shared_bytes);
  return block;
}

void start_cluster(Grid& grid, uint32_t index) {
  Machine& m = machine();
  const LaunchConfig& launch = grid.launch;
  auto cluster = std::make_unique<Cluster>();
  cluster->grid = &grid;
  cluster->index = index;
  cluster->barrier.cluster = cluster.get();
  const dim3 clusters(launch.grid.x / launch.cluster.x, launch.grid.y / launch.cluster.y,
                      launch.grid.z / launch.cluster.z);
  uint3 first = unflatten(index, clusters);
  first = {first.x * launch.cluster.x, first.y * launch.cluster.y, first.z * launch.cluster.z};
  for (uint32_t rank = 0; rank < volume(launch.cluster); ++rank) {
    cluster->blocks.push_back(make_block(*cluster, rank, first));
    cluster->live_threads += cluster->blocks.back()->thread_count;
    m.blocks_to_start.push_back(cluster->blocks.back().get());
  }
  m.resident.push_back(std::move(cluster));
}

void start_clusters() {
  Machine& m = machine();
  for (auto& grid : m.grids) {
    if (!may_start(*grid)) return;
    while (!grid->clusters_to_start.empty()) {
      if (m.config.resident_clusters != 0 && m.resident.size() >= m.config.resident_clusters) {
        return;
      }
      const uint32_t index = grid->clusters_to_start.back();
      grid->clusters_to_start.pop_back();
      start_cluster(*grid, index);
    }
  }
}

// ---- end ----------------------------------------------------------------------------------------

void free_cluster(Cluster& cluster) {
  for (auto& block : cluster.blocks) {
    for (uint32_t i = 0; i < block->thread_count; ++i) {
      if (block->threads[i].stack.bottom != nullptr) return_stack(block->threads[i].stack);
    }
    if (block->shared != nullptr) release_shared_memory(*block);
  }
}

// In any order: a programmatic dependent that has not waited for the grid before it may complete
// first, and nothing in PTX prevents the grid after it from starting then.
void complete_grids() {
  for (auto& grid : machine().grids) {
    if (grid->clusters_left != 0 || grid->complete) continue;
    grid->complete = true;
    wake_all(grid->completion);
    note_progress();
  }
}

void retire_clusters() {
  Machine& m = machine();
  for (size_t i = m.resident.size(); i-- > 0;) {
    Cluster& cluster = *m.resident[i];
    if (cluster.live_threads != 0 || cluster.operations_in_flight != 0) continue;
    for (auto& block : cluster.blocks) check_shared_tail(*block);
    free_cluster(cluster);
    --cluster.grid->clusters_left;
    m.resident.erase(m.resident.begin() + static_cast<std::ptrdiff_t>(i));
  }
  complete_grids();
}

void warp_exits(Warp& warp) {
  for (uint32_t i = 0; i < warp.collectives_used; ++i) {
    const Collective& collective = warp.collectives[i];
    if (collective.arrived != 0) {
      fail(ErrorKind::ExitCheck, "the last thread of the warp exits while lanes %08x wait at %s",
           collective.arrived, collective.describe().c_str());
    }
  }
}

// "32 x TMA load, 1 x wgmma"
std::string operations_on(const Block& block) {
  std::map<std::string, int> counts;
  for (const AsyncOperation& operation : machine().operations) {
    if (operation.touches == &block) ++counts[operation.what];
  }
  std::string text;
  for (const auto& [what, count] : counts) {
    text += format("%s%d x %s", text.empty() ? "" : ", ", count, what.c_str());
  }
  return text;
}

void block_exits(Block& block) {
  if (block.operations_in_flight != 0) {
    fail(ErrorKind::ExitCheck,
         "the block exits while asynchronous operations on its shared memory are in flight: %s; "
         "wait "
         "for them before the last thread returns",
         operations_on(block).c_str());
  }
  for (const NamedBarrier& barrier : block.barriers) {
    if (barrier.arrived != 0) {
      fail(ErrorKind::ExitCheck, "the block exits in the middle of a barrier phase: %s",
           barrier.describe().c_str());
    }
  }
  registers_block_exits(block);
  if (block.mbarriers != nullptr) block.mbarriers->block_exits(block);
  block.state = BlockState::Exited;
  --block.grid().blocks_left;
  grid_dependency_block_exits(block);
  machine().residency_changed = true;
}

}  // namespace

bool update_residency() {
  Machine& m = machine();
  m.residency_changed = false;
  retire_clusters();
  start_clusters();
  for (const auto& grid : m.grids) {
    if (!grid->complete) return true;
  }
  return false;
}

void start_block(Block& block) {
  Machine& m = machine();
  block.state = BlockState::Running;
  const Grid& grid = block.grid();
  if (&grid == m.grids.back().get() && grid.previous != nullptr && grid.previous->blocks_left > 0)
    count_early_block();
  for (uint32_t i = 0; i < block.thread_count; ++i) {
    Thread& thread = block.threads[i];
    thread.stack = take_stack(m.config.stack_bytes);
    prepare_context(thread.context, thread.stack, fiber_main);
    make_ready(thread);
  }
}

void thread_exits(Thread& thread) {
  Warp& warp = *thread.warp;
  Block& block = *warp.block;
  cp_async_thread_exits(thread);
  if (thread.bulk != nullptr) thread.bulk->thread_exits(thread);
  if (warp.wgmma != nullptr) warp.wgmma->thread_exits(thread);
  for (uint32_t i = 0; i < warp.collectives_used; ++i) {
    const Collective& collective = warp.collectives[i];
    if (collective.arrived != 0 && (collective.mask >> thread.lane & 1) != 0) {
      fail(ErrorKind::ExitCheck, "the thread exits while lanes %08x of its warp wait for it at %s",
           collective.arrived, collective.describe().c_str());
    }
  }
  warp.alive &= ~(1u << thread.lane);
  if (warp.alive == 0) warp_exits(warp);
  --block.cluster->live_threads;
  cluster_barrier_thread_exits(thread);
  race_release(&block.grid());
  race_thread_end(thread);
  if (--block.live_threads == 0) block_exits(block);
  thread.exited = true;
  note_progress();
}

void clear_machine() {
  Machine& m = machine();
  for (auto& cluster : m.resident) free_cluster(*cluster);
  m.operations.clear();
  m.resident.clear();
  m.grids.clear();
  m.blocks_to_start.clear();
  m.ready_warps.clear();
  m.pollers.clear();
  m.current = nullptr;
  m.current_operation = nullptr;
  m.failure = nullptr;
  m.scheduler = {};
}

}  // namespace emulator
