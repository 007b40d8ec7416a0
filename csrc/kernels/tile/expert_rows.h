// Which rows each expert of a mixture has, as offs says: expert e those from offs[e - 1] to offs[e];
// and the weights of rows.
#pragma once
#include <cstdint>

#include "ptx/target.h"

namespace lora_ext::kernel {

// With null for offs every expert has.
__device__ __forceinline__ bool has_rows(const int* offs, int expert) {
  return offs == nullptr || offs[expert] > (expert == 0 ? 0 : offs[expert - 1]);
}

// The first expert that ends behind a position.
__device__ __forceinline__ int expert_of(const int* offs, int experts, int64_t position) {
  int first = 0, last = experts - 1;
  while (first < last) {
    const int middle = first + (last - first) / 2;
    if (position < offs[middle]) {
      last = middle;
    } else {
      first = middle + 1;
    }
  }
  return first;
}

// Of a warp's threads, in each.
__device__ __forceinline__ float sum_of_warp(float sum) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2)
    sum += __shfl_xor_sync(0xFFFFFFFFu, sum, distance);
  return sum;
}

// Of weights in floats or in T.
template <class T>
__device__ __forceinline__ float weight_at(const void* weights, bool in_float, int64_t at) {
  return in_float ? static_cast<const float*>(weights)[at]
                  : static_cast<float>(static_cast<const T*>(weights)[at]);
}

}  // namespace lora_ext::kernel
