// Splits a float into two halves: value = hi + lo / kLoScale.
//
// For bfloat16, which has float's exponent range, lo = value - hi. For float16, value - hi would
// fall below its smallest number, 2^-24, for values under 2^-13, as gradients and fresh adapters
// have: there lo is stored 2^11 times as large, which float16 can always represent, since
//
//     |value - hi| <= 2^-11 |value|.
#pragma once
#include "kernel/rounded.h"
#include "ptx/target.h"

namespace lora_ext::kernel {

template <class T>
constexpr float kLoScale = std::is_same_v<T, __half> ? 2048.f : 1.f;

// A finite float above bfloat16's largest number gives hi = that largest number, and lo = the rest.
template <class T>
__device__ __forceinline__ T high_half(float value) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    constexpr float kLargest = 0x1.FEp127f, kLargestFloat = 0x1.FFFFFEp127f;
    if (fabsf(value) > kLargest && fabsf(value) <= kLargestFloat)
      return rounded<T>(copysignf(kLargest, value));
  }
  return rounded<T>(value);
}

template <class T>
__device__ __forceinline__ T low_half(float value) {
  const float left = value - static_cast<float>(high_half<T>(value));
  return rounded<T>(left * kLoScale<T>);
}

}  // namespace lora_ext::kernel
