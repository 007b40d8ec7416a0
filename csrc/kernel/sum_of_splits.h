// The sum of a skinny product's splits, in one fixed order: results repeat bit for bit.
#pragma once
#include <cstdint>

#include "kernel/halves.h"

namespace lora_ext::kernel {

// Returns hi + lo / kLoScale, each summed over the splits, which are `step` floats apart.
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
