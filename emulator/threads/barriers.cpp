// Named barriers: a warp arrives as a whole, the last arrival of a phase wakes all waiters.
#include "emulator/threads/barriers.h"

#include <bit>

#include "emulator/threads/warp.h"

namespace emulator {
namespace {

// The whole warp arrives. Returns the barrier if its phase is not complete, null if this arrival
// completes it.
Waitable* arrive(NamedBarrier& barrier, Warp& warp, uint32_t threads, const char* name) {
  if (barrier.arrived == 0) {
    barrier.expected = threads;
  } else if (barrier.expected != threads) {
    fail(ErrorKind::Misuse, "%s %u with %u threads, but others of this phase came with %u", name,
         barrier.index, threads, barrier.expected);
  }
  if ((barrier.arrived_warps >> warp.index & 1) != 0) {
    fail(ErrorKind::Misuse, "%s: the warp arrives twice in one phase of barrier %u; %s", name,
         barrier.index, barrier.describe().c_str());
  }
  for (uint32_t rest = warp.lanes; rest != 0; rest &= rest - 1) {
    race_release(
        *warp.threads[static_cast<uint32_t>(std::countr_zero(rest))], &barrier,
        barrier.arrived == 0 && rest == warp.lanes ? ReleaseMode::Replace : ReleaseMode::Join);
  }
  barrier.arrived_warps |= 1u << warp.index;
  barrier.arrived += kWarpSize;
  if (barrier.arrived < barrier.expected) return &barrier;
  barrier.arrived = 0;
  barrier.arrived_warps = 0;
  for (Thread* thread = barrier.waiters; thread != nullptr; thread = thread->next_waiter) {
    race_acquire(*thread, &barrier);
  }
  wake_all(barrier);
  return nullptr;
}

void bar(uint32_t id, uint32_t threads, const char* name, bool wait) {
  if (id >= kNamedBarriers)
    fail(ErrorKind::Misuse, "%s %u: there are %u barriers", name, id, kNamedBarriers);
  if (threads == 0 || threads % kWarpSize != 0) {
    fail(ErrorKind::Misuse, "%s %u: %u threads is not a multiple of the warp size", name, id,
         threads);
  }
  const uint32_t block_threads =
      static_cast<uint32_t>(current_thread().block().warps.size()) * kWarpSize;
  if (threads > block_threads) {
    fail(ErrorKind::Misuse, "%s %u: expects %u threads, but the block has %u", name, id, threads,
         block_threads);
  }
  struct {
  } none;
  const uint64_t immediate = static_cast<uint64_t>(id) << 32 | threads;
  warp_collective(aligned_mask(name), name, immediate, none, [&](const auto& lanes) -> Waitable* {
    NamedBarrier& barrier = lanes.warp.block->barriers[id];
    Waitable* incomplete = arrive(barrier, lanes.warp, threads, name);
    if (!wait) return nullptr;
    if (incomplete == nullptr) {
      lanes.for_each(
          [&](uint32_t lane, auto&) { race_acquire(*lanes.warp.threads[lane], &barrier); });
    }
    return incomplete;
  });
  preemption_point();
}

}  // namespace

std::string NamedBarrier::describe() const {
  std::string text =
      format("named barrier %u: %u of %u threads have arrived", index, arrived, expected);
  if (arrived != 0) text += format(" (warps by mask: %x)", arrived_warps);
  return text;
}

void bar_sync(uint32_t id, uint32_t threads) { bar(id, threads, "bar.sync", true); }
void bar_arrive(uint32_t id, uint32_t threads) { bar(id, threads, "bar.arrive", false); }

void syncthreads() {
  const Block& block = current_thread().block();
  if (block.live_threads != block.thread_count) {
    fail(ErrorKind::Misuse, "__syncthreads after %u of %u threads have exited",
         block.thread_count - block.live_threads, block.thread_count);
  }
  bar(0, static_cast<uint32_t>(block.warps.size()) * kWarpSize, "__syncthreads", true);
}

}  // namespace emulator
