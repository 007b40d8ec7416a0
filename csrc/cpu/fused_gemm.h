// The layer in one pass on the CPU: the base product, the low-rank part, bias and rounding.
//
//     Y[m, c] = sum_d P[m, d] Q[d, c] + scale * mask(m, c) sum_j T[m, j] U[j, c] + bias[c]
//
//     forward   P = X,  Q = W^T, T = S,  U = B^T         backward   P = dY, Q = W, T = dS, U = A
//
// Y is computed in tiles of 64 x 64 sums, which are rounded once. A panel is 64 columns of Q, or a
// part of its depth, packed as floats for the microkernel in cpu/brgemm.h; products of bfloat16 have a
// walk of their own. With many adapters, T, U and scale are those of the adapter of row m.
#pragma once

#include "cpu/skinny.h"

namespace lora_ext::cpu {

// Columns of a panel: [depth, 64].
constexpr int64_t kPanelCols = 64;

// Consecutive rows of a product with one adapter, and their low-rank part.
struct RowUpdate {
  Range rows;
  float* t;       // [rows, u.rank], dense
  AdapterView u;  // [rank, columns of Y]
  float scale;
  AdapterView q;  // T = t_scale * mask P q, where the walk makes it
  float t_scale;
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

// A strided matrix: element (d, c) of Q.
struct MatrixView {
  const void* data;
  Dtype dtype;
  int64_t depth_pitch;
  int64_t col_pitch;
};

struct FusedProduct;  // cpu/fused_product.h
struct ProductTask;

// Consecutive tasks of one thread, and its memory.
struct WalkShare {
  const ProductTask *begin, *end;
  char* memory;
};

// What a walk knows of all tasks: at most so many rows and columns each, and whether each has all rows
// of its part.
struct WalkTasks {
  int64_t rows, cols;
  bool are_whole;
};

// A walk of its own over a task, for products of bfloat16: on tiles of the processor, or by
// vdpbf16ps.
struct TileWalk {
  int64_t block_rows;      // multiplied at a time; tasks have multiples, but the last of a part
  int64_t least_rows;      // of a Q
  int64_t least_own_rows;  // of an adapter, on average
  int64_t most_depth;      // torch's deeper products are faster
  int64_t least_cols;      // of a task, where there are too few
  int64_t whole_depth;     // of a deeper product Q is packed for each task
  // Columns of a task at most, of a part with so many rows at most.
  int64_t (*cols)(int64_t depth, int64_t rows);
  // Whether T of all rows is better made here, with the bits of shrink, for so many columns of Y and
  // one adapter. Null: that of any adapters always is, with bits of its own.
  bool (*makes_t)(int64_t cols, const AdapterView& q, bool is_masked);
  // What a thread needs.
  int64_t (*bytes)(const FusedProduct& product, const WalkTasks& tasks);
  void (*run)(const FusedProduct& product, const WalkTasks& tasks, const WalkShare& share);
  // Makes T of the tasks' rows before any task runs. Null: tasks make it.
  void (*make_t)(const FusedProduct& product, const WalkShare& share) = nullptr;
};

// One table of functions per instruction set, as in skinny.h.
struct FusedGemmKernels {
  const SkinnyKernels* skinny;
  // Packs at most 64 columns; the panel has zeros in the others.
  void (*pack_float)(const MatrixView& q, Range depth, Range cols, float* panel);
  // out[i, d] = float(p[index[rows.begin + i], d]) for d in [0, depth); it writes whole vectors.
  void (*convert)(const void* p, Dtype dtype, int64_t pitch, RowIndex index, Range rows,
                  int64_t depth, float* out, int64_t out_pitch);
  // out[i, c] = scale * (T U)[i, c] for `rows` rows of T, and columns of U that were packed by
  // pack_expand of `skinny`: at most 64 x 64, row pitch 64.
  void (*low_rank_tile)(const RowUpdate& update, int64_t first_row, int64_t rows, int64_t width,
                        const void* u, float* out);
  // Rounds and stores at most 64 x 64 sums, which have a row pitch of 64.
  void (*store_tile)(const TileArgs& args, const float* sums, Range rows, Range cols);
  const TileWalk* tiles = nullptr;  // of bfloat16

  // The walk of a product by these panels, or null: it is by panels.
  const TileWalk* walk_of(Dtype panel) const { return panel == Dtype::kBFloat16 ? tiles : nullptr; }
};

inline FusedGemmKernels with_walk(FusedGemmKernels kernels, const TileWalk& walk) {
  kernels.tiles = &walk;
  return kernels;
}

// Null if this build or this processor lacks the instruction set.
const FusedGemmKernels* avx2_fused_gemm();
const FusedGemmKernels* avx512_fused_gemm();
const FusedGemmKernels* avx512_bf16_fused_gemm();
const FusedGemmKernels* amx_fused_gemm();

}  // namespace lora_ext::cpu
