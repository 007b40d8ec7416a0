// lora_dsdb: dS and the gradient of B in one pass over dY.
//
//     Z[panel]   = dY B            over the panel's kN columns of dY         [m, columns]
//     G[split]^T = dY^T (s S)      over the split's share of the m rows      [columns, n]
//
// lora_reduce adds the panels of Z, lora_reduce_wgrad the splits of G. With fp32 adapters the hi
// and lo halves of B and of s S lie side by side.
#pragma once

#include <cstdint>

#include "kernel/lora_gemm.h"

namespace lora_ext::kernel {

template <class T>
struct LoraDsdbParams {
  const T* dy;  // [m, n]
  const T* b;   // [n, columns]
  const T* s;   // [m, columns]
  float* z;     // [panels, m, columns], or null
  float* g;     // [splits, columns, n], or null
  int64_t dy_pitch, b_pitch, s_pitch;
  int m, n, columns;
  int steps_per_split;  // of 64 rows
};

// A block keeps all of its panel's G in registers, 64 floats a thread, whatever kColumns is: the
// fewer columns, the wider the panel and the fewer partial sums of dS.
template <int kColumns_>
struct LoraDsdbTile {
  static constexpr int kColumns = kColumns_, kColumnChunks = kColumns / 8;
  static constexpr int kThreads = 256, kM = 64, kStages = 3;
  static constexpr int kN = 16384 / kColumns;  // of a panel
  static constexpr int kChunkN = 128, kChunks = kN / kChunkN;
  static constexpr uint32_t kDyBytes = kM * kChunkN * 2, kSBytes = kM * kColumns * 2;
  static constexpr uint32_t kB = kStages * kDyBytes;  // B's panel stays
  static constexpr uint32_t kS = kB + kN * kColumns * 2;
  static constexpr uint32_t kSharedBytes = kS + kStages * kSBytes;
  static_assert(kColumns == 16 || kColumns == 32, "with 64, the sums of dS are a second pass");
  static_assert(kSharedBytes <= 99 * 1024, "what sm_86 gives to a block");
};

}  // namespace lora_ext::kernel
