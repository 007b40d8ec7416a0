// Dequantises frozen weights: from their stored form to floating values, for the product of a
// quantised base.
//
//     four_bits    out[i] = table[code i] * scale[i / block]              NF4, FP4, e2m1
//     panels       the same for codes stored in panels of 32 rows, with a bfloat16 scale
//     eight_bits   out[r, c] = code[r, c] * (scale[r / m, c / n] * multiplier)    int8, e4m3
//
// NF4: Dettmers et al. 2023. e2m1 in MXFP4 and NVFP4: OCP Microscaling Formats 1.0, 2023.
//
// Products are computed in float and rounded once to the dtype of out, bit for bit as in
// bitsandbytes. One table of functions per instruction set, as in skinny.h; op/dequantize.cpp
// distributes over threads.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/dtypes.h"
#include "cpu/skinny.h"

namespace lora_ext::cpu {

struct FourBitArgs {
  const uint8_t* packed;  // two codes a byte
  bool low_first;         // of a byte, the first code is in the lower half
  const float* table;     // 16 values
  const float* scale;     // one per block
  int64_t count;          // codes
  int64_t block;          // codes that share a scale; even
  void* out;              // [count]
  Dtype dtype;
};

// Panel p holds rows 32 p .. 32 p + 31 of [rows, cols]: 32 bytes for each pair of columns; byte 2 i
// + j has the code of row 32 p + i and column j of the pair in its lower half, that of row 32 p +
// 16 + i in its upper half.
struct PanelArgs {
  static constexpr int64_t kRows = 32;

  const uint8_t* packed;  // [rows / 32, cols / 2, 32]
  const float* table;     // 16 values
  const BFloat16* scale;  // [cols / block, rows]
  int64_t rows;           // a multiple of 32
  int64_t cols;           // a multiple of block
  int64_t block;          // columns that share a scale; a multiple of 32
  void* out;              // [rows, cols]
  Dtype dtype;
};

struct EightBitArgs {
  const void* codes;  // [matrices, rows, cols] of int8_t or Float8
  bool is_float8;
  const float* scale;  // [matrices, rows / block_rows, cols / block_cols], both rounded up
  float multiplier;
  int64_t rows, cols;  // of a matrix
  int64_t block_rows, block_cols;
  void* out;  // as codes
  Dtype dtype;
};

// Scales that are 8-bit codes themselves: table[code] * scale[i / block] + offset, rounded after the
// product and after the sum.
struct NestedScales {
  const uint8_t* codes;
  const float* table;  // 256 values
  const float* scale;  // one per block of codes
  float offset;
  int64_t block;

  // Writes the scales of a range to out, from its start.
  void read(Range range, float* __restrict out) const {
    const float plus = offset;  // which a store to out might change
    for (int64_t i = range.begin; i < range.end;) {
      const float factor = scale[i / block];
      const int64_t count = std::min(range.end, (i / block + 1) * block) - i;
      const uint8_t* __restrict from = codes + i;
      const float* __restrict values = table;
      for (int64_t j = 0; j < count; ++j) out[j] = values[from[j]] * factor + plus;
      i += count, out += count;
    }
  }
};

struct DequantizeKernels {
  void (*four_bits)(const FourBitArgs& args, Range blocks);
  void (*panels)(const PanelArgs& args, Range panels);
  void (*eight_bits)(const EightBitArgs& args, Range rows);  // of all matrices
};

// Null if this build or this processor lacks the instruction set.
const DequantizeKernels* portable_dequantize();
const DequantizeKernels* avx2_dequantize();
const DequantizeKernels* avx512_dequantize();

}  // namespace lora_ext::cpu
