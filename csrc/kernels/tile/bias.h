// The bias added to the columns of Y, stored in float or in Y's type.
#pragma once
#include "ptx/target.h"

namespace lora_ext::kernel {

template <class T>
struct Bias {
  const void* data;  // [n], or null
  bool in_float;
  int n;

  // Returns the bias of two neighbouring columns in each of kBlocks blocks of 8 columns, in a
  // lane's layout of the accumulators of mma and wgmma; the first column is `column`. Returns 0 if
  // there is no bias, and past the last column.
  template <int kBlocks>
  __device__ __forceinline__ void load(float (&values)[kBlocks][2], int column) const {
    if (data == nullptr) {
#pragma unroll
      for (int i = 0; i < kBlocks; ++i) values[i][0] = values[i][1] = 0.f;
    } else if (in_float) {
      load_from(values, static_cast<const float*>(data), column);
    } else {
      load_from(values, static_cast<const T*>(data), column);
    }
  }

  template <int kBlocks, class Element>
  __device__ __forceinline__ void load_from(float (&values)[kBlocks][2], const Element* bias,
                                            int column) const {
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int at = column + i * 8 + e;
        values[i][e] = at < n ? static_cast<float>(bias[at]) : 0.f;
      }
    }
  }
};

}  // namespace lora_ext::kernel
