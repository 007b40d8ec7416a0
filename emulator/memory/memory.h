// Accesses with an ordering: acquire and release flags, atomics, fences, and distributed shared
// memory.
#pragma once
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "emulator/race/race.h"

namespace emulator {

/// ld.acquire.gpu / st.release.gpu / red.add.release.gpu / atom.add.relaxed.gpu
uint32_t load_acquire_gpu(const uint32_t* address);
void store_release_gpu(uint32_t* address, uint32_t value);
void atomic_add_release_gpu(uint32_t* address, uint32_t value);
uint32_t atomic_add_relaxed_gpu(uint32_t* address, uint32_t value);

/// fence.acq_rel.gpu (__threadfence) / fence.acq_rel.cluster / __threadfence_block
void fence_acq_rel_gpu();
void fence_acq_rel_cluster();
void fence_acq_rel_block();

/// fence.proxy.async for .shared::cta / .global
void fence_proxy_async_shared();
void fence_proxy_async_global();

/// ld.shared::cluster and st.shared::cluster of 4 bytes.
uint32_t load_shared_cluster_u32(uint32_t address);
void store_shared_cluster_u32(uint32_t address, uint32_t value);

template <class T>
T load_shared_cluster(uint32_t address) {
  static_assert(sizeof(T) == 4 && std::is_trivially_copyable_v<T>);
  const uint32_t bits = load_shared_cluster_u32(address);
  T value;
  std::memcpy(&value, &bits, 4);
  return value;
}
template <class T>
void store_shared_cluster(uint32_t address, T value) {
  static_assert(sizeof(T) == 4 && std::is_trivially_copyable_v<T>);
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  store_shared_cluster_u32(address, bits);
}

/// What comes before and after the read-modify-write of an atomic built-in (builtins.h). One that
/// leaves the value as it was (a failed compare-and-swap, a maximum) counts as polling.
void atomic_begin(const void* address, uint32_t bytes, const char* what);
void atomic_end(const void* address, uint32_t bytes, bool changed, const char* what);

/// *address becomes update(old); returns old. Its two plain accesses are one atomic one, which
/// atomic_begin has reported.
template <class T, class Update>
[[gnu::no_sanitize("thread")]] T atomic_update(T* address, const char* what, Update update) {
  atomic_begin(address, sizeof(T), what);
  const T old = *address;
  const T now = update(old);
  *address = now;
  atomic_end(address, sizeof(T), std::memcmp(&now, &old, sizeof(T)) != 0, what);
  return old;
}

}  // namespace emulator
