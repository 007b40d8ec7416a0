// lora_dsdb: dS and the gradient of B in one pass over dY.
//
//     Z[panel]   = dY B            over the panel's kN columns of dY         [m, columns]
//     G[split]^T = dY^T (s S)      over the split's range of the m rows      [columns, n]
//
// lora_reduce sums Z over the panels, lora_reduce_wgrad sums G over the splits. With fp32 adapters
// the hi and lo halves of B and of s S are stored side by side.
#pragma once

#include <cstdint>

#include "kernel/lora_gemm.h"

namespace lora_ext::kernel {

template <class T>
struct LoraDsdbParams {
  const T* dy;  // [m, n]
  const T* b;   // [n, columns]
  const T* s;   // [m, columns]
  float* z;     // [panels, m, columns]; may be null
  float* g;     // [splits, columns, n]; may be null
  int64_t dy_pitch, b_pitch, s_pitch;
  int m, n, columns;
  int steps_per_split;  // of 64 rows
};

// A block keeps all of its panel's G in registers, 64 floats per thread for every kColumns: the
// fewer columns, the wider the panel and the fewer partial sums of dS.
template <int kColumns_>
struct LoraDsdbTile {
  static constexpr int kColumns = kColumns_, kColumnChunks = kColumns / 8;
  static constexpr int kThreads = 256, kM = 64, kStages = 3;
  static constexpr int kN = 16384 / kColumns;  // per panel
  static constexpr int kChunkN = 128, kChunks = kN / kChunkN;
  static constexpr uint32_t kDyBytes = kM * kChunkN * 2, kSBytes = kM * kColumns * 2;
  static constexpr uint32_t kB = kStages * kDyBytes;  // the panel of B stays in shared memory
  static constexpr uint32_t kS = kB + kN * kColumns * 2;
  static constexpr uint32_t kSharedBytes = kS + kStages * kSBytes;
  static_assert(kColumns == 16 || kColumns == 32, "with 64, the sums of dS are a second pass");
  static_assert(kSharedBytes <= 99 * 1024, "what sm_86 gives to a block");
};

}  // namespace lora_ext::kernel
