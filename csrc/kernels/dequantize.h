// Dequantisation on a device: parameters of the kernels, and the function that launches them. Plain
// C++ without device code.
#pragma once
#include <cstdint>
#include <string>
#include <variant>

#include "common/dtype.h"

namespace lora_ext::kernel {

// Matrices one after the other, one unless they are a mixture's experts.
struct DequantizedMatrices {
  void* out;
  int64_t count;  // values of each
  int matrices;
  // Of experts: the ends of their rows, int32, and the expert of the first matrix. Those without
  // rows are left out; null: none is.
  const int* offs;
  int first;
  bool aligned;  // as a format says, each matrix
};

struct Dequantize4bitParams : DequantizedMatrices {
  static constexpr int kMinBlockBits = 4;

  const uint8_t* packed;       // two codes a byte
  const float* table;          // 16 values
  const float* scale;          // one per block; if null, computed from the members below
  const uint8_t* scale_codes;  // one per block
  const float* scale_table;    // 256 values
  const float* scale_scale;    // one per scale_block blocks
  const float* scale_offset;   // one value
  // Both are powers of two. Each matrix begins a block. Aligned: packed to 4 bytes, out to 16.
  int block_bits, scale_block_bits;
  bool low_first;  // of two codes of a byte, the first is in the lower half
};

// Aligned: codes to 8 bytes, out to 16; rows, and blocks of a row, are whole 16-byte chunks of out.
struct Dequantize8bitParams : DequantizedMatrices {
  static constexpr bool kIsFloat8 = false;

  const void* codes;   // [matrices, rows, columns] of int8, or of e4m3
  const float* scale;  // [matrices, scales]: of each block, by rows
  int64_t scales;      // of a matrix
  int64_t rows;        // of a matrix, fewer than 2^31
  uint32_t columns;
  int row_bits, column_bits;  // a block's sizes are powers of two; 31: all of the matrix
  uint32_t scale_columns;     // blocks of a row
  float multiplier;
};

struct DequantizeFloat8Params : Dequantize8bitParams {
  static constexpr bool kIsFloat8 = true;
};

// Those of any format.
using DequantizeParams =
    std::variant<Dequantize4bitParams, Dequantize8bitParams, DequantizeFloat8Params>;

}  // namespace lora_ext::kernel

namespace lora_ext::cuda {

// Launches on `stream` of the current device, without synchronising with the host, and writes
// values of the dtype, a floating one; count > 0. Returns "" or the error of the launch.
std::string launch_dequantize(Dtype dtype, const kernel::DequantizeParams& params, void* stream);

}  // namespace lora_ext::cuda
