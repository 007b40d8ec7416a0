// Dequantisation on a device: parameters of the kernels, and the function that launches them. Plain
// C++ without device code.
#pragma once
#include <cstdint>
#include <string>
#include <variant>

#include "common/dtype.h"

namespace lora_ext::kernel {

struct Dequantize4bitParams {
  static constexpr int kMinBlockBits = 5;

  const uint8_t* packed;       // two codes a byte, the first in the upper half
  const float* table;          // 16 values
  const float* scale;          // one per block; if null, computed from the members below
  const uint8_t* scale_codes;  // one per block
  const float* scale_table;    // 256 values
  const float* scale_scale;    // one per scale_block blocks
  const float* scale_offset;   // one value
  void* out;
  int64_t count;
  int block_bits, scale_block_bits;  // both are powers of two
  bool aligned;                      // packed to 4 bytes and out to 16 bytes
};

struct Dequantize8bitParams {
  const int8_t* codes;  // [rows, columns]
  const float* scale;   // one per row
  void* out;            // [rows, columns]
  int64_t count;
  uint32_t columns;
  float multiplier;
  bool aligned;  // codes to 8 bytes, out to 16 bytes; rows are whole 16-byte chunks of out
};

// Those of any format.
using DequantizeParams = std::variant<Dequantize4bitParams, Dequantize8bitParams>;

}  // namespace lora_ext::kernel

namespace lora_ext::cuda {

// Launches on `stream` of the current device, without synchronising with the host, and writes
// values of the dtype, a floating one; count > 0. Returns "" or the error of the launch.
std::string launch_dequantize(Dtype dtype, const kernel::DequantizeParams& params, void* stream);

}  // namespace lora_ext::cuda
