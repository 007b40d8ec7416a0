// lora_wgrad: gradients of the adapters, split along the rows. lora_reduce_wgrad.h sums the splits.
//
//     G[split]^T = P^T U            over the split's range of the m rows    [columns, c]
//
//     dA   P = drop(X), U = dS      [r, K]
//     dB   P = dY,      U = s S     [N, r], here transposed as well
//
// One grid computes one product or both. With fp32 adapters U's hi and lo halves are stored side by
// side.
//
// If lora_gemm on sm_90a computes dX, this grid may start beside its last tiles (programmatic
// dependent launch, PDL): all operands are ready by then, or `written` tells when dS is.
#pragma once

#include <cstdint>

#include "kernel/lora_gemm.h"
#include "kernel/mask.h"

namespace lora_ext::kernel {

template <class T>
struct LoraWgradProduct {
  const T* p;  // [m, c]
  const T* u;  // [m, columns]
  float* g;    // [splits, columns, c]
  int64_t p_pitch, u_pitch;
  int c, columns, splits;
  int steps_per_split;  // of 64 rows
  bool masked;          // whether P is masked; only in masked kernels
  // If a grid that may still run writes U = dS (lora_gemm_sm90a/in_grid.h): U is complete when this
  // counter reaches `parts`. Else null and 0.
  const uint32_t* written;
  uint32_t parts;
};

template <class T>
struct LoraWgradParams {
  LoraWgradProduct<T> product[2];  // the second may have no splits
  int m;
  Mask mask;
};

// 128 columns of P, 32 for each of four warps, and 64 columns of U. P is read once for every 64
// columns of U.
struct LoraWgradTile {
  static constexpr int kC = 128, kColumns = 64, kM = 64, kStages = 3, kThreads = 128;
  static constexpr uint32_t kLeftBytes = kM * kC * 2, kRightBytes = kM * kColumns * 2;
  static constexpr uint32_t kStageBytes = kLeftBytes + kRightBytes;
  static constexpr uint32_t kSharedBytes = kStages * kStageBytes;  // 72 KiB
};

}  // namespace lora_ext::kernel
