// The layer in one pass on the CPU: the base product, the low-rank part, bias and rounding.
//
//     Y[m, c] = sum_d P[m, d] Q[d, c] + scale * mask(m, c) sum_j T[m, j] U[j, c] + bias[c]
//
//     forward   P = X,  Q = W^T, T = S,  U = B^T         backward   P = dY, Q = W, T = dS, U = A
//
// Y is computed in tiles of 64 x 64 sums, which are rounded once. A panel is 64 columns of Q, or a
// part of its depth, packed for the microkernel in cpu/brgemm.h.
#pragma once

#include "cpu/skinny.h"

namespace lora_ext::cpu {

// Columns of a panel. In float it is [depth, 64]; in bfloat16 [depth / 2, 64, 2], with the depth
// rounded up to an even number and zeros there.
constexpr int64_t kPanelCols = 64;

// What is added to a tile before it is stored.
struct TileArgs {
  void* y;  // [rows, cols], row pitch y_pitch elements
  Dtype dtype;
  int64_t y_pitch;
  int64_t cols;
  const void* bias;  // [cols] in dtype, or null
  const float* t;    // [rows, rank], or null: no low-rank part
  int64_t rank;
  const void* u;  // packed by pack_expand of the same instruction set
  float scale;
  Dropout dropout;
};

// A strided matrix: element (d, c) of Q.
struct MatrixView {
  const void* data;
  Dtype dtype;
  int64_t depth_pitch;
  int64_t col_pitch;
};

// One table of functions per instruction set, as in skinny.h.
struct FusedGemmKernels {
  const SkinnyKernels* skinny;
  // Packs at most 64 columns; the panel has zeros in the others.
  void (*pack_float)(const MatrixView& q, Range depth, Range cols, float* panel);
  void (*pack_bfloat16)(const MatrixView& q, Range depth, Range cols, BFloat16* panel);
  // out[i, d] = float(p[i, d]) for d in [0, depth); it writes whole vectors.
  void (*convert)(const void* p, Dtype dtype, int64_t pitch, int64_t rows, int64_t depth,
                  float* out, int64_t out_pitch);
  // Rounds and stores at most 64 x 64 sums, which have a row pitch of 64.
  void (*store_tile)(const TileArgs& args, const float* sums, Range rows, Range cols);
};

// Null if this build or this processor lacks the instruction set.
const FusedGemmKernels* avx2_fused_gemm();
const FusedGemmKernels* avx512_fused_gemm();

}  // namespace lora_ext::cpu
