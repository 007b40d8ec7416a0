// The CUDA C++ names that kernels use without any wrapper, for a kernel compiled by the host
// compiler.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <math.h>  // nvcc includes it by itself
#include <vector_types.h>

#include <algorithm>
#include <bit>
#include <cstring>

#include "emulator/machine/machine.h"
#include "emulator/memory/memory.h"
#include "emulator/threads/barriers.h"
#include "emulator/threads/warp.h"

// CUDA's headers define some of these as attributes that g++ does not know.
#undef __global__
#undef __device__
#undef __host__
#undef __shared__
#undef __constant__
#undef __grid_constant__
#undef __launch_bounds__
#undef __cluster_dims__
#undef __forceinline__
#undef __noinline__
#define __global__
#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __launch_bounds__(...)
#define __cluster_dims__(...)
// GCC instruments no store of what a call returns in memory (*p = high_half(x)): inlined, it is
// one.
#ifdef EMULATOR_RACE
#define __forceinline__ inline __attribute__((always_inline))
#else
#define __forceinline__ inline
#endif
#define __noinline__ [[gnu::noinline]]
// A static __shared__ variable would be one variable for all blocks: kernels use dynamic shared
// memory.
#define __shared__ static_assert(false, "use ptx::dynamic_shared_memory() instead of __shared__");

#define threadIdx (::emulator::thread_index())
#define blockIdx (::emulator::block_index())
#define blockDim (::emulator::block_dimensions())
#define gridDim (::emulator::grid_dimensions())
#define warpSize 32

namespace emulator {

inline const uint3& thread_index() { return current_thread().index; }
inline const uint3& block_index() { return current_thread().block().index; }
inline const dim3& block_dimensions() { return current_thread().block().grid().launch.block; }
inline const dim3& grid_dimensions() { return current_thread().block().grid().launch.grid; }

template <class T>
T shuffle(Shuffle kind, uint32_t mask, T value, uint32_t argument, int width) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= sizeof(uint64_t));
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = shuffle_bits(kind, mask, bits, argument, width);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace emulator

using std::max;
using std::min;

inline void __syncthreads() { emulator::syncthreads(); }
inline void __syncwarp(unsigned mask = 0xffffffffu) { emulator::syncwarp(mask); }
inline void __threadfence() { emulator::fence_acq_rel_gpu(); }
inline void __threadfence_block() { emulator::fence_acq_rel_block(); }

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  return emulator::shuffle(emulator::Shuffle::Index, mask, value, uint32_t(source), width);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  return emulator::shuffle(emulator::Shuffle::Up, mask, value, delta, width);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  return emulator::shuffle(emulator::Shuffle::Down, mask, value, delta, width);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32) {
  return emulator::shuffle(emulator::Shuffle::Xor, mask, value, uint32_t(lane_mask), width);
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  return emulator::ballot(mask, predicate != 0);
}
inline int __any_sync(unsigned mask, int predicate) {
  return emulator::ballot(mask, predicate != 0) != 0;
}
inline int __all_sync(unsigned mask, int predicate) {
  return emulator::ballot(mask, predicate != 0) == mask;
}

/// The argument types are CUDA's: int, unsigned, unsigned long long, float, double. T is taken from
/// the pointer alone.
template <class T>
T atomicAdd(T* address, std::type_identity_t<T> value) {
  return emulator::atomic_update(address, "atomicAdd", [=](T old) { return T(old + value); });
}
template <class T>
T atomicMax(T* address, std::type_identity_t<T> value) {
  return emulator::atomic_update(address, "atomicMax", [=](T old) { return std::max(old, value); });
}
template <class T>
T atomicExch(T* address, std::type_identity_t<T> value) {
  return emulator::atomic_update(address, "atomicExch", [=](T) { return value; });
}
template <class T>
T atomicCAS(T* address, std::type_identity_t<T> expected, std::type_identity_t<T> desired) {
  return emulator::atomic_update(address, "atomicCAS",
                                 [=](T old) { return old == expected ? desired : old; });
}

inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>(static_cast<uint64_t>(a) * b >> 32);
}
/// Rounded on its own: never part of a fused multiply-add, to which the compiler may turn a product
/// and a sum.
[[gnu::noinline]] inline float __fmul_rn(float a, float b) { return a * b; }
[[gnu::noinline]] inline float __fadd_rn(float a, float b) { return a + b; }
inline int __popc(unsigned value) { return std::popcount(value); }
inline int __clz(int value) { return std::countl_zero(static_cast<unsigned>(value)); }
inline int __ffs(int value) { return __builtin_ffs(value); }
template <class T>
T __ldg(const T* pointer) {
  return *pointer;
}
