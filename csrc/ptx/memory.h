// Memory accesses that C++ cannot express: ordered accesses to flags between blocks in global
// memory, accesses to the shared memory of other blocks of the cluster, and asynchronous copies
// from global to shared memory, 16 bytes per thread, in commit groups.
#pragma once
#include <type_traits>

#include "ptx/target.h"

namespace lora_ext::ptx {

// ld.acquire.gpu (sm_70): what the writer did before its release is visible after it.
LORA_EXT_DEVICE uint32_t load_acquire_gpu(const uint32_t* flag) {
#ifdef __CUDACC__
  uint32_t value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];"
               : "=r"(value)
               : "l"(__cvta_generic_to_global(flag))
               : "memory");
  return value;
#else
  return emulator::load_acquire_gpu(flag);
#endif
}

// red.release.gpu.add (sm_70): adds, with release semantics.
LORA_EXT_DEVICE void atomic_add_release_gpu(uint32_t* counter, uint32_t value) {
#ifdef __CUDACC__
  asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(__cvta_generic_to_global(counter)),
               "r"(value)
               : "memory");
#else
  emulator::atomic_add_release_gpu(counter, value);
#endif
}

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

// ld.shared::cluster (sm_90): reads at an address from map_shared. T = uint32_t or float.
template <typename T>
LORA_EXT_DEVICE T load_shared_cluster(uint32_t address) {
  static_assert(std::is_same_v<T, uint32_t> || std::is_same_v<T, float>);
#ifdef __CUDACC__
  T value;
  if constexpr (std::is_same_v<T, float>) {
    asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(value) : "r"(address) : "memory");
  } else {
    asm volatile("ld.shared::cluster.u32 %0, [%1];" : "=r"(value) : "r"(address) : "memory");
  }
  return value;
#else
  return emulator::load_shared_cluster<T>(address);
#endif
}

// st.shared::cluster (sm_90): writes at an address from map_shared. T = uint32_t or float.
template <typename T>
LORA_EXT_DEVICE void store_shared_cluster(uint32_t address, T value) {
  static_assert(std::is_same_v<T, uint32_t> || std::is_same_v<T, float>);
#ifdef __CUDACC__
  if constexpr (std::is_same_v<T, float>) {
    asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(address), "f"(value) : "memory");
  } else {
    asm volatile("st.shared::cluster.u32 [%0], %1;" ::"r"(address), "r"(value) : "memory");
  }
#else
  emulator::store_shared_cluster<T>(address, value);
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
