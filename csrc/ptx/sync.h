// Synchronisation: the 16 named barriers of a block, the barrier of a cluster, fences between the
// generic and the async proxy and between threads, and programmatic dependent launch (PDL).
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

// Bulk copies and wgmma access memory through the async proxy. Ordinary stores of a thread become
// visible there only after a proxy fence of the same thread (PTX ISA, "Proxies").

// fence.proxy.async.shared::cta (sm_90): shared memory, generic to async proxy.
LORA_EXT_DEVICE void fence_proxy_async_shared() {
#ifdef __CUDACC__
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#else
  emulator::fence_proxy_async_shared();
#endif
}

// fence.proxy.async.global (sm_90): global memory, generic to async proxy.
LORA_EXT_DEVICE void fence_proxy_async_global() {
#ifdef __CUDACC__
  asm volatile("fence.proxy.async.global;" ::: "memory");
#else
  emulator::fence_proxy_async_global();
#endif
}

// fence.acq_rel.gpu (sm_70): acquire and release at the scope of the device; __threadfence() is the
// stronger fence.sc.
LORA_EXT_DEVICE void fence_acq_rel_gpu() {
#ifdef __CUDACC__
  asm volatile("fence.acq_rel.gpu;" ::: "memory");
#else
  emulator::fence_acq_rel_gpu();
#endif
}

// With PDL, a grid starts before the grid that it depends on has ended.

// griddepcontrol.wait (sm_90): waits until the grids that this one depends on have completed and
// their memory is visible. A no-op in a grid without such a dependency.
LORA_EXT_DEVICE void griddepcontrol_wait() {
#ifdef __CUDACC__
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
#else
  emulator::griddepcontrol_wait();
#endif
}

// griddepcontrol.launch_dependents (sm_90): the grids that depend on this one may start once all
// its blocks have executed this or exited. It does not publish what the blocks wrote. A dependent
// grid may read what this grid started behind, or a block had waited for, where a fence.acq_rel.gpu
// stands between that and this; for all else it must itself wait. A no-op if no grid depends on
// this one.
LORA_EXT_DEVICE void griddepcontrol_launch_dependents() {
#ifdef __CUDACC__
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
#else
  emulator::griddepcontrol_launch_dependents();
#endif
}

}  // namespace lora_ext::ptx
