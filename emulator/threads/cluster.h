// Clusters: ranks and the hardware barrier of a cluster.
#pragma once
#include <cstdint>

namespace emulator {

struct Thread;

uint32_t cluster_rank();
/// barrier.cluster.arrive.release / .relaxed / barrier.cluster.wait.acquire, without .aligned:
/// lanes come one by one.
void cluster_arrive();
void cluster_arrive_relaxed();
void cluster_wait();

/// An exit: fails between arrive and wait; otherwise the barrier no longer expects this thread.
void cluster_barrier_thread_exits(Thread& thread);

}  // namespace emulator
