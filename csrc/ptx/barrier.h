// Barriers of threads: the 16 named barriers of a block, and the barrier of a cluster.
//
// The cluster's barrier is used without .aligned, which would not allow the lanes of a warp to
// arrive at different times, as those of a producer warp do.
#pragma once

#include "ptx/target.h"

namespace lora_ext::ptx {

// bar.sync (sm_70): waits until `threads` threads, a multiple of 32, have arrived at barrier `id`,
// 0..15. Barrier 0 is __syncthreads().
LORA_EXT_DEVICE void bar_sync(uint32_t id, uint32_t threads) {
#ifdef __CUDACC__
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
#else
  emulator::bar_sync(id, threads);
#endif
}

// bar.arrive (sm_70): counts this thread at barrier `id` and does not wait.
LORA_EXT_DEVICE void bar_arrive(uint32_t id, uint32_t threads) {
#ifdef __CUDACC__
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
#else
  emulator::bar_arrive(id, threads);
#endif
}

// barrier.cluster.arrive (sm_90): counts this thread at the cluster's barrier, with release
// semantics, and does not wait.
LORA_EXT_DEVICE void cluster_arrive() {
#ifdef __CUDACC__
  asm volatile("barrier.cluster.arrive;" ::: "memory");
#else
  emulator::cluster_arrive();
#endif
}

// barrier.cluster.arrive.relaxed (sm_90): counts this thread at the cluster's barrier, orders
// nothing, and does not wait. It is enough after a fence.mbarrier_init, as in the PTX ISA's
// example; the form with release waits for L2 (MEMBAR.ALL.GPU).
LORA_EXT_DEVICE void cluster_arrive_relaxed() {
#ifdef __CUDACC__
  asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory");
#else
  emulator::cluster_arrive_relaxed();
#endif
}

// barrier.cluster.wait (sm_90): waits until every thread of the cluster has arrived, with acquire
// semantics.
LORA_EXT_DEVICE void cluster_wait() {
#ifdef __CUDACC__
  asm volatile("barrier.cluster.wait;" ::: "memory");
#else
  emulator::cluster_wait();
#endif
}

}  // namespace lora_ext::ptx
