// Eight neighbouring elements of a row, of T or floats: 16 bytes at a time where they lie so.
#pragma once
#include "kernels/tile/copy.h"
#include "kernels/tile/halves.h"

namespace lora_ext::kernel {

template <class V>
struct alignas(16) RowChunk {
  static constexpr int kElements = 8;
  V of[kElements];

  // Whether all elements are in the row, which has `left` from here on, and aligned.
  __device__ __forceinline__ static bool is_whole(const void* at, int left) {
    return reinterpret_cast<uintptr_t>(at) % 16 == 0 && left >= kElements;
  }

  __device__ __forceinline__ void load_whole(const V* from) {
    *this = *reinterpret_cast<const RowChunk*>(from);
  }
  // Zeros past the row's end.
  __device__ __forceinline__ void load_part(const V* from, int left) {
#pragma unroll
    for (int i = 0; i < kElements; ++i) of[i] = i < left ? from[i] : V(0.f);
  }
  __device__ __forceinline__ void load(const V* from, int left) {
    is_whole(from, left) ? load_whole(from) : load_part(from, left);
  }

  __device__ __forceinline__ void store(V* to, int left) const {
    if (is_whole(to, left)) {
      *reinterpret_cast<RowChunk*>(to) = *this;
    } else {
#pragma unroll
      for (int i = 0; i < kElements; ++i)
        if (i < left) to[i] = of[i];
    }
  }
};

}  // namespace lora_ext::kernel
