// A float as the sum of two halves: hi + lo / kLoScale.
//
// bfloat16 has float's exponents, and lo is what hi leaves. What half leaves would fall below its
// smallest number, 2^-24, for values under 2^-13, which gradients and fresh adapters are: there lo
// is kept 2^11 times as large, which its exponents always hold, since |value - hi| <= 2^-11
// |value|.
#pragma once
#include "kernel/rounded.h"
#include "ptx/target.h"

namespace lora_ext::kernel {

template <class T>
constexpr float kLoScale = std::is_same_v<T, __half> ? 2048.f : 1.f;

// A float above bfloat16's largest number is still a number: the largest, and what it leaves.
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
