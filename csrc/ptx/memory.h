// Memory accesses that C++ cannot express: a counter in global memory that blocks share, and
// asynchronous copies from global to shared memory, 16 bytes per thread, in commit groups.
#pragma once
#include "ptx/target.h"

namespace lora_ext::ptx {

// atom.relaxed.gpu.add (sm_70): adds and returns the old value; orders nothing.
LORA_EXT_DEVICE uint32_t atomic_add_relaxed_gpu(uint32_t* counter, uint32_t value) {
#ifdef __CUDACC__
  uint32_t old;
  asm volatile("atom.relaxed.gpu.global.add.u32 %0, [%1], %2;"
               : "=r"(old)
               : "l"(__cvta_generic_to_global(counter)), "r"(value)
               : "memory");
  return old;
#else
  return emulator::atomic_add_relaxed_gpu(counter, value);
#endif
}

// cp.async.cg 16 (sm_80): copies src_bytes <= 16 bytes, bypassing L1, and fills the rest of the 16
// with zeros. With src_bytes == 0 nothing is read, so `src` may be any address.
LORA_EXT_DEVICE void cp_async_16(uint32_t dst, const void* src, uint32_t src_bytes) {
#ifdef __CUDACC__
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(dst),
               "l"(__cvta_generic_to_global(src)), "r"(src_bytes)
               : "memory");
#else
  emulator::cp_async_16(dst, src, src_bytes);
#endif
}

// cp.async.commit_group (sm_80): this thread's copies since the last commit become one group.
LORA_EXT_DEVICE void cp_async_commit_group() {
#ifdef __CUDACC__
  asm volatile("cp.async.commit_group;" ::: "memory");
#else
  emulator::cp_async_commit_group();
#endif
}

// cp.async.wait_group (sm_80): waits until at most the kPending latest groups are in flight. It
// covers only this thread's copies: other threads need a barrier after it.
template <int kPending>
LORA_EXT_DEVICE void cp_async_wait_group() {
#ifdef __CUDACC__
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#else
  emulator::cp_async_wait_group(kPending);
#endif
}

}  // namespace lora_ext::ptx
