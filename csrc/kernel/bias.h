// The bias of Y's columns, in float or in the type of Y.
#pragma once
#include "kernel/fault.h"

namespace lora_ext::kernel {

template <class T, class Fault>
struct Bias {
  const void* data;  // [n], or null
  bool in_float;
  int n;

  // 0 without a bias and past the last column.
  __device__ __forceinline__ float at(int column) const {
    if (Fault::flag("bias.none", data == nullptr || column >= n)) return 0.f;
    if (Fault::flag("bias.in_float", in_float)) return static_cast<const float*>(data)[column];
    return static_cast<float>(static_cast<const T*>(data)[column]);
  }
};

}  // namespace lora_ext::kernel
