// lora_reduce: sums the splits of a skinny product, in one fixed order.
//
//     S = keep_scale * sum of Z         over splits, hi + lo / kLoScale   [m, rank]
//     T = scaling * S                   in X's type, as hi and lo         [m, width] each
#pragma once

#include <cstdint>

#include "kernel/sum_of_splits.h"
#include "ptx/grid_dependency.h"

namespace lora_ext::kernel {

template <class T>
struct LoraReduceParams {
  const float*
      z;     // [splits, m, z_pitch]: the rank's columns, with two terms lo's from lo_column on
  float* s;  // [m, rank]; may be null
  T* t[2];   // [m, width], hi and lo; lo may be null
  int64_t t_pitch;
  int m, rank, splits, terms;
  int z_pitch, lo_column;
  int width;  // >= rank; T's columns past the rank become zero
  float keep_scale, scaling;
};

// One thread per element of T. lora_gemm may start at once (PDL): it waits before it reads T.
template <class T>
__global__ void __launch_bounds__(256) lora_reduce(const __grid_constant__ LoraReduceParams<T> p) {
  ptx::griddepcontrol_launch_dependents();
  const int64_t count = static_cast<int64_t>(p.m) * p.width;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count;
       i += step) {
    const int64_t row = i / p.width, column = i % p.width;
    float t = 0.f;
    if (column < p.rank) {
      const float s = p.keep_scale * sum_of_splits<T>(p.z + row * p.z_pitch + column, p.splits,
                                                      static_cast<int64_t>(p.m) * p.z_pitch,
                                                      p.terms, p.lo_column);
      if (p.s != nullptr) p.s[row * p.rank + column] = s;
      t = p.scaling * s;
    }
    p.t[0][row * p.t_pitch + column] = high_half<T>(t);
    if (p.t[1] != nullptr) p.t[1][row * p.t_pitch + column] = low_half<T>(t);
  }
}

}  // namespace lora_ext::kernel
