// The layer in one pass on the CPU: the base product, the low-rank part, bias and rounding.
//
//     Y[m, c] = sum_d P[m, d] Q[d, c] + scale * mask(m, c) sum_j T[m, j] U[j, c] + bias[c]
//
//     forward   P = X,  Q = W^T, T = S,  U = B^T         backward   P = dY, Q = W, T = dS, U = A
//
// Y is computed in tiles of 64 x 64 sums, which are rounded once. A panel is 64 columns of Q, or a
// part of its depth, packed for the microkernel in cpu/brgemm.h. With many adapters, T, U and scale
// are those of the adapter of row m.
#pragma once

#include "cpu/skinny.h"

namespace lora_ext::cpu {

// Columns of a panel. In float it is [depth, 64]; in bfloat16 [depth / 2, 64, 2], with the depth
// rounded up to an even number and zeros there.
constexpr int64_t kPanelCols = 64;

// Consecutive rows of a product with one adapter, and their low-rank part.
struct RowUpdate {
  Range rows;
  const float* t;  // [rows, u.rank], dense
  AdapterView u;   // [rank, columns of Y]
  float scale;
};

// Where a tile is stored, and what is added to it. Row m of the product is row rows[m] of P, of Y
// and of the mask.
struct TileArgs {
  void* y;  // row pitch y_pitch elements
  Dtype dtype;
  int64_t y_pitch;
  const void* bias;       // [columns of Y] in dtype, or null
  const float* low_rank;  // of the tile, row pitch 64; or null
  Dropout dropout;        // of the low-rank part
  RowIndex rows;
  MaskBits mask{};  // of all rows of the product, drawn before, if it walks on tiles
};

// The update of all rows, if a walk on tiles makes its T as it packs P: with the bits of shrink,
// T = scale * mask P Q for this Q.
struct OwnT {
  AdapterView q;
  float scale;
  MaskBits mask;  // of P, or none
  float* t;       // [rows, rank], dense
};

// A strided matrix: element (d, c) of Q.
struct MatrixView {
  const void* data;
  Dtype dtype;
  int64_t depth_pitch;
  int64_t col_pitch;
};

struct FusedProduct;  // cpu/fused_product.h
struct ProductTask;

// A walk of its own over a task, for products of bfloat16: on tiles of the processor.
struct TileWalk {
  int64_t whole_depth;             // of a deeper product Q is packed for each task
  int64_t (*cols)(int64_t depth);  // of a task at most
  // Whether T = P Q of all rows is better made here than by shrink, for so many columns of Y.
  bool (*makes_t)(int64_t cols, const AdapterView& q, bool is_masked);
  // What a thread needs for tasks of at most so many rows and columns.
  int64_t (*bytes)(const FusedProduct& product, int64_t rows, int64_t cols);
  void (*run)(const FusedProduct& product, const ProductTask* begin, const ProductTask* end,
              char* memory, int64_t rows, int64_t cols);
};

// One table of functions per instruction set, as in skinny.h.
struct FusedGemmKernels {
  const SkinnyKernels* skinny;
  // Packs at most 64 columns; the panel has zeros in the others.
  void (*pack_float)(const MatrixView& q, Range depth, Range cols, float* panel);
  void (*pack_bfloat16)(const MatrixView& q, Range depth, Range cols, BFloat16* panel);
  // out[i, d] = float(p[index[rows.begin + i], d]) for d in [0, depth); it writes whole vectors.
  void (*convert)(const void* p, Dtype dtype, int64_t pitch, RowIndex index, Range rows,
                  int64_t depth, float* out, int64_t out_pitch);
  // out[i, c] = scale * (T U)[i, c] for `rows` rows of T, and columns of U that were packed by
  // pack_expand of `skinny`: at most 64 x 64, row pitch 64.
  void (*low_rank_tile)(const RowUpdate& update, int64_t first_row, int64_t rows, int64_t width,
                        const void* u, float* out);
  // Rounds and stores at most 64 x 64 sums, which have a row pitch of 64.
  void (*store_tile)(const TileArgs& args, const float* sums, Range rows, Range cols);
  const TileWalk* tiles = nullptr;  // instead of panels of bfloat16

  // The walk of a product by these panels, or null: it is by panels.
  const TileWalk* walk_of(Dtype panel) const { return panel == Dtype::kBFloat16 ? tiles : nullptr; }
};

// Null if this build or this processor lacks the instruction set.
const FusedGemmKernels* avx2_fused_gemm();
const FusedGemmKernels* avx512_fused_gemm();
const FusedGemmKernels* amx_fused_gemm();

}  // namespace lora_ext::cpu
