// Copies chunks of rows of a factor into shared memory as halves: asynchronously, or through
// registers if they are floats or halves at odd addresses.
#pragma once
#include "kernels/tile/copy.h"
#include "kernels/tile/halves.h"

namespace lora_ext::kernel {

// The same pointer, known to be into global memory. By one that might be into shared memory no load
// is issued before the stores to shared memory that stand before it have ended.
template <class F>
__device__ __forceinline__ const F* in_global_memory(const F* pointer) {
#ifdef __CUDA_ARCH__
  __builtin_assume(__isGlobal(pointer));
#endif
  return pointer;
}

// Where a chunk of a row begins, and how many of its elements are inside: none if `left` is not
// above 0.
template <class F>
struct FactorPlace {
  const F* source;
  int left;
  bool aligned;  // `source` is a multiple of 16 bytes
  bool lo;       // of floats
};

// Elements F of a chunk in registers.
template <class T, class F>
struct FactorChunk {
  static constexpr bool kSplit = std::is_same_v<F, float>;
  static constexpr int kElements = Element<T>::kChunk;
  F elements[kElements];

  // Zeros for elements that are not inside.
  __device__ __forceinline__ void load(const FactorPlace<F>& place) {
    const F* from = in_global_memory(place.source);
    if (kSplit && place.aligned && place.left >= kElements) {
      load_floats(from);
    } else {
#pragma unroll
      for (int i = 0; i < kElements; ++i) elements[i] = i < place.left ? from[i] : F(0.f);
    }
  }
  __device__ __forceinline__ void load_floats(const F* from) {
    if constexpr (kSplit) {
      float4 quarters[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) quarters[i] = reinterpret_cast<const float4*>(from)[i];
      memcpy(elements, quarters, sizeof elements);
    }
  }

  __device__ __forceinline__ void store(uint32_t to, bool lo) const {
    T halves[kElements];
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      if constexpr (kSplit) {
        halves[i] = high_half<T>(elements[i]);
        if (lo) halves[i] = low_half<T>(elements[i], halves[i]);
      } else {
        halves[i] = elements[i];
      }
    }
    uint4 chunk;
    memcpy(&chunk, halves, sizeof chunk);
    *reinterpret_cast<uint4*>(ptx::dynamic_shared_memory() + to) = chunk;
  }
};

// Copies chunks to offsets in shared memory; of halves one, asynchronously if it is aligned. All
// loads of floats are issued before the first store: one after the other, each would be a round
// trip through L2 or DRAM.
template <class T, class F, int kChunks>
__device__ __forceinline__ void copy_factor_chunks(uint32_t shared, const uint32_t (&to)[kChunks],
                                                   const FactorPlace<F> (&places)[kChunks]) {
  using Chunk = FactorChunk<T, F>;
  if constexpr (!Chunk::kSplit) {
    static_assert(kChunks == 1);
    if (places[0].aligned) {
      const int inside = min(max(places[0].left, 0), Chunk::kElements);
      return ptx::cp_async_16(shared + to[0], places[0].source,
                              static_cast<uint32_t>(inside) * sizeof(T));
    }
  }
  Chunk chunks[kChunks];
#pragma unroll
  for (int i = 0; i < kChunks; ++i) chunks[i].load(places[i]);
#pragma unroll
  for (int i = 0; i < kChunks; ++i) chunks[i].store(to[i], places[i].lo);
}

}  // namespace lora_ext::kernel
