// Fences: between the generic and the async proxy, and between threads.
//
// Bulk copies and wgmma access memory through the async proxy. Ordinary stores of a thread become
// visible there only after a proxy fence of the same thread (PTX ISA, "Proxies").
#pragma once

#include "ptx/target.h"

namespace lora_ext::ptx {

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

}  // namespace lora_ext::ptx
