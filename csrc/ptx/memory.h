// Memory accesses that C++ cannot express: ordered accesses to flags between blocks in global
// memory, and accesses to the shared memory of other blocks of the cluster.
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

}  // namespace lora_ext::ptx
