// lora_shrink: the skinny product of the LoRA linear, split along k. lora_reduce.h adds the splits.
//
//     Z[split] = drop(X) A^T                   over the split's share of k       [m, columns]
//
// A is [columns, k], and columns = terms * rank: with fp32 adapters A's two halves lie one below
// the other, hi first. Forward calls it with X and A; dS = dY B with dY and B^T laid out as [r, n].
#pragma once

#include <cstdint>

#include "kernel/lora_gemm.h"
#include "kernel/mask.h"

namespace lora_ext::kernel {

template <class T>
struct LoraShrinkParams {
  const T* x;  // [m, k]
  const T* a;  // [columns, k]
  float* z;    // [splits, m, columns]
  int64_t x_pitch, a_pitch;
  int m, k, columns;
  int splits, steps_per_split;  // of 64 along k
  Mask mask;                    // of X; for masked kernels only
};

// 64 rows of X; four warps of 16 rows each. X is read once for every 64 columns.
using LoraShrinkTile = LoraGemmTile<64, 64, 16, 64, 4>;

}  // namespace lora_ext::kernel
