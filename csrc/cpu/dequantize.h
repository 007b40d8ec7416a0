// Frozen weights from the form in which they are stored to floating values: what a quantised base
// is before its product.
//
//     four_bits    out[i] = table[code i] * scale[i / block]          NF4, FP4
//     panels       the same of codes that lie in panels of 32 rows, with a bfloat16 scale
//     eight_bits   out[n, k] = code[n, k] * (scale[n] * multiplier)   int8 with a scale a row
//
// NF4: Dettmers et al. 2023.
//
// Products are made in float and rounded once to the dtype of out, bit for bit as bitsandbytes
// does. One table of functions per instruction set, as in skinny.h; op/dequantize.cpp spreads over
// threads.
#pragma once

#include <cstdint>

#include "cpu/dtypes.h"
#include "cpu/skinny.h"

namespace lora_ext::cpu {

struct FourBitArgs {
  const uint8_t* packed;  // two codes a byte, the first in the upper half
  const float* table;     // 16 values
  const float* scale;     // one a block
  int64_t count;          // codes
  int64_t block;          // codes with one scale, even
  void* out;              // [count]
  Dtype dtype;
};

// Panel p holds rows 32 p .. 32 p + 31 of [rows, cols]: for each pair of columns 32 bytes, byte
// 2 i + j with the code of row 32 p + i and column j of the pair in its lower half, that of row
// 32 p + 16 + i in its upper.
struct PanelArgs {
  static constexpr int64_t kRows = 32;

  const uint8_t* packed;  // [rows / 32, cols / 2, 32]
  const float* table;     // 16 values
  const BFloat16* scale;  // [cols / block, rows]
  int64_t rows;           // a multiple of 32
  int64_t cols;           // a multiple of block
  int64_t block;          // columns with one scale, a multiple of 32
  void* out;              // [rows, cols]
  Dtype dtype;
};

struct EightBitArgs {
  const int8_t* codes;  // [rows, cols]
  const float* scale;   // [rows]
  float multiplier;
  int64_t cols;
  void* out;  // [rows, cols]
  Dtype dtype;
};

struct DequantizeKernels {
  void (*four_bits)(const FourBitArgs& args, Range blocks);
  void (*panels)(const PanelArgs& args, Range panels);
  void (*eight_bits)(const EightBitArgs& args, Range rows);
};

// Null where this build or this processor lacks the instruction set.
const DequantizeKernels* portable_dequantize();
const DequantizeKernels* avx2_dequantize();
const DequantizeKernels* avx512_dequantize();

}  // namespace lora_ext::cpu
