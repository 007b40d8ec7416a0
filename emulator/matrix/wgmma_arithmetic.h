// The arithmetic of one warp's part of wgmma.m64nNk16, 16 rows:
//
//     d[16, N] (+)= a[16, 16] b[16, N]
//
// Operands are widened to float, where each product is exact (8 x 8 or 11 x 11 significand bits).
// d is accumulated in fp32 in the order k = 0, 1, .. 15, one rounding a step. The order of a tensor
// core is not documented; compare results within K * 2^-23 * sum |a||b|, never bit by bit.
#pragma once

#include <cstdint>
#include <cstring>

#include "emulator/matrix/descriptor.h"
#include "emulator/matrix/formats.h"

namespace emulator {

// The instruction's compile-time part: m64n<n>k16, the operands' format and layouts.
struct WgmmaShape {
  Format format;
  int n;
  Major major_a, major_b;  // major_a counts only where a lies in shared memory

  bool operator==(const WgmmaShape&) const = default;
};

constexpr int kWarpRows = 16;  // rows of a and d that one of the four warps holds
constexpr int kMaxN = 256;

// Widens 8 consecutive elements.
inline void widen(Format format, const uint8_t* chunk, float (&out)[8]) {
  uint16_t bits[8];
  std::memcpy(bits, chunk, sizeof bits);
  if (format == Format::kBFloat16) {
    for (int i = 0; i < 8; ++i) out[i] = bfloat16_to_float(bits[i]);
  } else {
    for (int i = 0; i < 8; ++i) out[i] = float16_to_float(bits[i]);
  }
}

// Reads `rows` rows from `first_row` on into out[k * rows + row]. `chunk(address)` gives the 16
// bytes at a shared address; each chunk is asked for once.
template <typename ChunkReader>
void read_operand(const MatrixDescriptor& d, Major major, Format format, int first_row, int rows,
                  ChunkReader&& chunk, float* out) {
  float values[8];
  if (major == Major::kK) {
    for (int row = 0; row < rows; ++row) {
      for (int k = 0; k < int{kWgmmaK}; k += 8) {
        widen(format, chunk(element_address(d, major, first_row + row, k)), values);
        for (int i = 0; i < 8; ++i) out[(k + i) * rows + row] = values[i];
      }
    }
  } else {
    for (int k = 0; k < int{kWgmmaK}; ++k) {
      for (int row = 0; row < rows; row += 8) {
        widen(format, chunk(element_address(d, major, first_row + row, k)), values);
        std::memcpy(out + k * rows + row, values, sizeof values);
      }
    }
  }
}

// d[16, n] += a b with a as a[k][16] and b as b[k][n]. Loops over 8 columns have a constant length,
// so that they become vector instructions at -O2.
inline void multiply_accumulate(const float* a, const float* b, float* d, int n) {
  constexpr int kColumns = 8;
  for (int col = 0; col < n; col += kColumns) {
    for (int row = 0; row < kWarpRows; ++row) {
      float sums[kColumns];
      for (int i = 0; i < kColumns; ++i) sums[i] = d[row * n + col + i];
      for (int k = 0; k < int{kWgmmaK}; ++k) {
        const float factor = a[k * kWarpRows + row];
        for (int i = 0; i < kColumns; ++i) sums[i] += factor * b[k * n + col + i];
      }
      for (int i = 0; i < kColumns; ++i) d[row * n + col + i] = sums[i];
    }
  }
}

}  // namespace emulator
