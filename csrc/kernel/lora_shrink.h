// lora_shrink: the skinny product of the LoRA linear, split along k. lora_reduce.h sums the splits.
//
//     forward   Z[split] = drop(X) A^T     over the split's range of k       [m, columns]
//     dS        Z[split] = dY B            over the split's range of n
//
// The right operand is K-major, [columns, k] (forward: A), or MN-major, [k, columns] (dS: B). With
// fp32 adapters its hi and lo halves are stored one after the other along `columns`.
#pragma once

#include <cstdint>

#include "kernel/lora_gemm.h"
#include "kernel/mask.h"

namespace lora_ext::kernel {

template <class T>
struct LoraShrinkParams {
  const T* x;  // [m, k]
  const T* a;  // [columns, k] or [k, columns]
  float* z;    // [splits, m, columns]
  int64_t x_pitch, a_pitch;
  int m, k, columns;
  int steps_per_split;  // of 64 along k
  Mask mask;            // of X; only for masked kernels
};

// 64 rows of X; four warps of 16 rows each. X is read once for every 64 columns. Three stages, 48
// KiB: three blocks per SM of sm_80, two per SM of sm_86.
using LoraShrinkTile = LoraGemmTile<64, 64, 16, 64, 3>;

}  // namespace lora_ext::kernel
