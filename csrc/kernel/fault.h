// Fault sites of kernels: each barrier, wait, count and predicate of a kernel is wrapped in one of
// these five, so that tests can make it misbehave (tests/emulator/fault.h lists how). With NoFault
// every site is a constant, and nothing of it reaches the device.
#pragma once
#include <vector_types.h>  // __host__ and __device__, which mean nothing to a host compiler

#include <type_traits>

namespace lora_ext::kernel {

struct NoFault {
  __host__ __device__ static constexpr bool skip(const char*) { return false; }
  __host__ __device__ static constexpr bool swap(const char*) { return false; }
  template <class V>
  __host__ __device__ static constexpr V value(const char*, V right, std::type_identity_t<V>) {
    return right;
  }
  template <class V>
  __host__ __device__ static constexpr V count(const char*, V right, std::type_identity_t<V>,
                                               std::type_identity_t<V>) {
    return right;
  }
  __host__ __device__ static constexpr bool flag(const char*, bool right) { return right; }
};

}  // namespace lora_ext::kernel
