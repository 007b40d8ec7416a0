// mbarrier objects: barriers in shared memory that count arrivals and the bytes of bulk copies.
//
// A phase completes when the pending arrivals and the pending bytes are both zero; the next begins
// at once. Phases alternate in parity; the first has parity 0.
#pragma once

#include "ptx/target.h"
#include "ptx/thread.h"

namespace lora_ext::ptx {

// mbarrier.init (sm_80): an 8-byte aligned object; every phase expects `count` arrivals.
LORA_EXT_DEVICE void mbarrier_init(uint32_t bar, uint32_t count) {
#ifdef __CUDACC__
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(count) : "memory");
#else
  emulator::mbarrier_init(bar, count);
#endif
}

// mbarrier.arrive at another block's object (sm_90): one arrival at the object that block `rank` of
// the cluster has at `bar`, for stages that wgmma has read and bulk copies will fill again.
//
// Without qualifiers the arrival is .release at .cta scope: it counts, but what this thread wrote
// or read by ordinary instructions is ordered only for its own block (PTX ISA, "Morally strong":
// the scope of either operation must include the thread of the other). Operations of the async
// proxy that this thread has waited for are ordered all the same: they have ended when it arrives,
// and a copy issued because the phase has completed cannot come before them. The form with
// .release.cluster would only add a MEMBAR.ALL.GPU of every warp at every stage.
LORA_EXT_DEVICE void mbarrier_arrive_remote(uint32_t bar, uint32_t rank) {
#ifdef __CUDACC__
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(map_shared(bar, rank))
               : "memory");
#else
  emulator::mbarrier_arrive_remote(bar, rank);
#endif
}

// mbarrier.arrive.expect_tx (sm_90): adds `bytes` to the pending bytes, then arrives.
LORA_EXT_DEVICE void mbarrier_arrive_expect_tx(uint32_t bar, uint32_t bytes) {
#ifdef __CUDACC__
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes)
               : "memory");
#else
  emulator::mbarrier_arrive_expect_tx(bar, bytes);
#endif
}

// mbarrier.try_wait.parity (sm_90): true, with acquire semantics, if the phase of this parity has
// completed; may suspend the thread for a while first.
LORA_EXT_DEVICE bool mbarrier_try_wait(uint32_t bar, uint32_t parity) {
#ifdef __CUDACC__
  uint32_t completed;
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
      "selp.b32 %0, 1, 0, p;\n"
      "}"
      : "=r"(completed)
      : "r"(bar), "r"(parity)
      : "memory");
  return completed != 0;
#else
  return emulator::mbarrier_try_wait(bar, parity);
#endif
}

// mbarrier.try_wait.parity in a loop (sm_90): waits until the phase of this parity has completed.
LORA_EXT_DEVICE void mbarrier_wait(uint32_t bar, uint32_t parity) {
#ifdef __CUDACC__
  while (!mbarrier_try_wait(bar, parity)) {
  }
#else
  emulator::mbarrier_wait(bar, parity);
#endif
}

// fence.mbarrier_init (sm_90): makes this thread's mbarrier.init visible to the cluster and to the
// async proxy, once a barrier has followed.
LORA_EXT_DEVICE void fence_mbarrier_init() {
#ifdef __CUDACC__
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#else
  emulator::fence_mbarrier_init();
#endif
}

}  // namespace lora_ext::ptx
