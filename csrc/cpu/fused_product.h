// Products in one pass, with the kernels of cpu/fused_gemm.h: what they read and write.
#pragma once

#include <vector>

#include "cpu/fused_gemm.h"

namespace lora_ext::cpu {

// Deeper rows lie too far apart for the library's 32-bit offsets within a tile.
constexpr int64_t kMaxPanelDepth = 1 << 22;

// Consecutive rows of a product with one Q: all rows of a layer, or those of an expert.
struct BasePart {
  Range rows;
  const void* q;     // element (0, 0); the rest is said by FusedProduct::q
  const void* bias;  // [cols] in the dtype of Y, or null
};

struct FusedProduct {
  const FusedGemmKernels& kernels;
  Dtype panel;  // of P and Q as they are multiplied
  const void* p;
  Dtype p_dtype;
  int64_t p_pitch;
  RowIndex p_rows;  // row m of the product is row p_rows[m] of P
  int64_t depth, cols;
  MatrixView q;                           // its data is that of each part
  TileArgs tile;                          // bias and low_rank are set for each tile
  const std::vector<BasePart>& parts;     // in the order of their rows, without gaps
  const std::vector<RowUpdate>& updates;  // in the order of their rows; others have none
  bool makes_t = false;                   // the walk makes T of all updates
  MaskBits p_mask{};                      // of P in T, or none
};

// A part's rows by columns of Y, for one thread.
struct ProductTask {
  const BasePart* part;
  Range rows, cols;
  int64_t work;
};

// On threads. The result does not depend on their number.
void multiply(const FusedProduct& product);

}  // namespace lora_ext::cpu
