// The barrier of a cluster: threads arrive one by one, exited threads are not expected.
#include "emulator/threads/cluster.h"

#include "emulator/machine/scheduler.h"

namespace emulator {
namespace {

const void* sync_object(const ClusterBarrier& barrier) {
  return &barrier.sync_objects[barrier.generation & 1];
}

// PTX ISA, barrier.cluster: the barrier expects all non-exited threads of the cluster.
void complete_if_all_arrived(Cluster& cluster) {
  ClusterBarrier& barrier = cluster.barrier;
  if (barrier.arrived == 0 || barrier.arrived < cluster.live_threads) return;
  for (Thread* thread = barrier.waiters; thread != nullptr; thread = thread->next_waiter) {
    thread->cluster_arrived = false;
    race_acquire(*thread, sync_object(barrier));
  }
  barrier.arrived = 0;
  ++barrier.generation;
  wake_all(barrier);
}

void arrive(const char* name, bool release) {
  Thread& thread = current_thread();
  Cluster& cluster = *thread.block().cluster;
  ClusterBarrier& barrier = cluster.barrier;
  if (thread.cluster_arrived) {
    fail(ErrorKind::Misuse, "%s twice without barrier.cluster.wait; %s", name,
         barrier.describe().c_str());
  }
  if (barrier.arrived == 0) race_forget(sync_object(barrier));
  if (release) {
    perform_before_release(thread);
    race_release(sync_object(barrier));
  } else {
    race_release_fenced(sync_object(barrier), Scope::Cluster);
  }
  thread.cluster_arrived = true;
  thread.cluster_generation = barrier.generation;
  ++barrier.arrived;
  complete_if_all_arrived(cluster);
  preemption_point();
}

}  // namespace

std::string ClusterBarrier::describe() const {
  return format("cluster barrier of cluster %u: phase %llu, %u of %u live threads have arrived",
                cluster->index, static_cast<unsigned long long>(generation), arrived,
                cluster->live_threads);
}

uint32_t cluster_rank() { return current_thread().block().rank; }

void cluster_arrive() { arrive("barrier.cluster.arrive", true); }
void cluster_arrive_relaxed() { arrive("barrier.cluster.arrive.relaxed", false); }

void cluster_wait() {
  Thread& thread = current_thread();
  ClusterBarrier& barrier = thread.block().cluster->barrier;
  if (!thread.cluster_arrived) {
    fail(ErrorKind::Misuse, "barrier.cluster.wait without an arrive before it; %s",
         barrier.describe().c_str());
  }
  if (thread.cluster_generation == barrier.generation) {
    block_on(barrier);
  } else {
    thread.cluster_arrived = false;
    race_acquire(&barrier.sync_objects[thread.cluster_generation & 1]);
  }
}

void cluster_barrier_thread_exits(Thread& thread) {
  Cluster& cluster = *thread.block().cluster;
  if (thread.cluster_arrived) {
    fail(ErrorKind::ExitCheck, "the thread exits between barrier.cluster.arrive and .wait; %s",
         cluster.barrier.describe().c_str());
  }
  complete_if_all_arrived(cluster);
}

}  // namespace emulator
