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
  static constexpr int kMinBlockBits = 5;

  const uint8_t* packed;       // two codes a byte, the first in the upper half
  const float* table;          // 16 values
  const float* scale;          // one per block; if null, computed from the members below
  const uint8_t* scale_codes;  // one per block
  const float* scale_table;    // 256 values
  const float* scale_scale;    // one per scale_block blocks
  const float* scale_offset;   // one value
  // Both are powers of two. Each matrix begins a block. Aligned: packed to 4 bytes, out to 16.
  int block_bits, scale_block_bits;
};

// Aligned: codes to 8 bytes, out to 16; rows are whole 16-byte chunks of out.
struct Dequantize8bitParams : DequantizedMatrices {
  const int8_t* codes;  // [rows, columns]
  const float* scale;   // one per row
  uint32_t columns;
  float multiplier;
};

// Those of any format.
using DequantizeParams = std::variant<Dequantize4bitParams, Dequantize8bitParams>;

}  // namespace lora_ext::kernel

namespace lora_ext::cuda {

// Launches on `stream` of the current device, without synchronising with the host, and writes
// values of the dtype, a floating one; count > 0. Returns "" or the error of the launch.
std::string launch_dequantize(Dtype dtype, const kernel::DequantizeParams& params, void* stream);

}  // namespace lora_ext::cuda
