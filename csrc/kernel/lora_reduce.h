// lora_reduce: from the splits of lora_shrink to S, and to the factor T of lora_gemm.
//
//     S = keep_scale * sum of Z         over splits and terms, in order   [m, rank]
//     T = scaling * S                   in X's type, as hi and lo         [m, rank] each
#pragma once

#include <cstdint>

#include "kernel/fault.h"
#include "kernel/rounded.h"
#include "ptx/target.h"

namespace lora_ext::kernel {

template <class T>
struct LoraReduceParams {
  const float* z;  // [splits, m, terms * rank]
  float* s;        // [m, rank]
  T* t[2];         // [m, rank], hi and lo; lo may be null
  int64_t t_pitch;
  int m, rank, splits, terms;
  float keep_scale, scaling;
};

// One thread an element of S. The order of the sum is fixed: results repeat bit for bit.
template <class T, class Fault = NoFault>
__global__ void __launch_bounds__(256) lora_reduce(const __grid_constant__ LoraReduceParams<T> p) {
  const int64_t count = static_cast<int64_t>(p.m) * p.rank;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
       i < Fault::count("reduce.elements", count, count - 1, count + 1); i += step) {
    const int64_t row = i / p.rank, column = i % p.rank;
    float sum = 0.f;
    for (int split = 0; split < Fault::count("reduce.splits", p.splits, p.splits - 1, p.splits + 1);
         ++split) {
      const float* z = p.z + (static_cast<int64_t>(split) * p.m + row) * p.terms * p.rank + column;
      for (int term = 0; term < Fault::count("reduce.terms", p.terms, p.terms - 1, p.terms + 1);
           ++term)
        sum += z[static_cast<int64_t>(term) * p.rank];
    }
    const float s = sum * p.keep_scale, t = s * p.scaling;
    p.s[i] = s;
    const T hi = rounded<T>(t);
    p.t[0][row * p.t_pitch + column] = hi;
    if (Fault::flag("reduce.has_lo", p.t[1] != nullptr))
      p.t[1][row * p.t_pitch + column] = rounded<T>(t - static_cast<float>(hi));
  }
}

}  // namespace lora_ext::kernel
