// Floats as half types: rounded to nearest even, split into two halves, and summed from both.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "ptx/target.h"

namespace lora_ext::kernel {

template <class T>
__device__ __forceinline__ T rounded(float value) {
  if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(value);
  } else {
    static_assert(std::is_same_v<T, __nv_bfloat16>);
    return __float2bfloat16_rn(value);
  }
}

// Two elements in one register, the first in the low half.
template <class T>
__device__ __forceinline__ uint32_t rounded_pair(float low, float high) {
  uint32_t bits;
  if constexpr (std::is_same_v<T, __half>) {
    const __half2 pair = __floats2half2_rn(low, high);
    memcpy(&bits, &pair, sizeof bits);
  } else {
    static_assert(std::is_same_v<T, __nv_bfloat16>);
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    memcpy(&bits, &pair, sizeof bits);
  }
  return bits;
}

// A float as two halves: value = hi + lo / kLoScale.
//
// For bfloat16, which has float's exponent range, lo = value - hi. For float16, value - hi would
// fall below its smallest number, 2^-24, for values under 2^-13, as gradients and fresh adapters
// have: there lo is stored 2^11 times as large, which float16 can always represent, since
//
//     |value - hi| <= 2^-11 |value|.

template <class T>
constexpr float kLoScale = std::is_same_v<T, __half> ? 2048.f : 1.f;

// A finite float above bfloat16's largest number gives hi = that largest number, and lo = the rest.
template <class T>
__device__ __forceinline__ T high_half(float value) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    constexpr float kLargest = 0x1.FEp127f, kLargestFloat = 0x1.FFFFFEp127f;
    if (fabsf(value) > kLargest && fabsf(value) <= kLargestFloat)
      value = copysignf(kLargest, value);
  }
  return rounded<T>(value);
}

template <class T>
__device__ __forceinline__ T low_half(float value, T high) {
  const float left = value - static_cast<float>(high);
  return rounded<T>(left * kLoScale<T>);
}
template <class T>
__device__ __forceinline__ T low_half(float value) {
  return low_half(value, high_half<T>(value));
}

// The sum of a skinny product's splits: hi + lo / kLoScale, each summed over the splits, which are
// `step` floats apart. The order is fixed: results repeat bit for bit.
template <class T>
__device__ __forceinline__ float sum_of_splits(const float* z, int splits, int64_t step, int terms,
                                               int64_t lo) {
  float sum = 0.f, sum_lo = 0.f;
  for (int split = 0; split < splits; ++split, z += step) {
    sum += z[0];
    if (terms == 2) sum_lo += z[lo];
  }
  return sum + sum_lo * (1.f / kLoScale<T>);
}

}  // namespace lora_ext::kernel
