// lora_reduce_wgrad: sums the splits of lora_wgrad and lora_dsdb into the gradients of A and B.
//
//     dA = scale * sum of G^T       over splits, hi + lo / kLoScale      [rank, K]
//     dB = scale * sum of G                                              [N, rank]
#pragma once

#include "kernel/sum_of_splits.h"
#include "ptx/target.h"

namespace lora_ext::kernel {

struct LoraReduceGradient {
  const float* g;  // [splits, g_columns, c]; with two terms lo's columns begin at lo_column
  void* gradient;  // [rank, c], or [c, rank] if transposed; float, or the kernel's T
  int c, rank, splits, terms;
  int g_columns, lo_column;
  bool transposed, in_float;
  float scale;
};

struct LoraReduceWgradParams {
  LoraReduceGradient gradient[2];  // one per blockIdx.y
};

// One thread per element, neighbouring threads along c.
template <class T>
__global__ void __launch_bounds__(256)
    lora_reduce_wgrad(const __grid_constant__ LoraReduceWgradParams p) {
  const LoraReduceGradient& what = p.gradient[blockIdx.y];
  const int64_t count = static_cast<int64_t>(what.rank) * what.c;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count;
       i += step) {
    const int64_t column = i / what.c, c = i % what.c;
    const float value =
        what.scale * sum_of_splits<T>(what.g + i, what.splits,
                                      static_cast<int64_t>(what.g_columns) * what.c, what.terms,
                                      static_cast<int64_t>(what.lo_column) * what.c);
    const int64_t at = what.transposed ? c * what.rank + column : i;
    if (what.in_float) {
      static_cast<float*>(what.gradient)[at] = value;
    } else {
      static_cast<T*>(what.gradient)[at] = rounded<T>(value);
    }
  }
}

}  // namespace lora_ext::kernel
