// Where the elements of a matrix are in the registers of a warp or a warpgroup: the figures of the
// PTX ISA ("Matrix fragments for mma.m16n8k16", "ldmatrix", "Register fragments for
// wgmma.mma_async.m64nNk16") as functions. A 32-bit register holds two 16-bit elements, the one
// with the lower index in the lower half; `half` is 0 for it and 1 for the other.
#pragma once

#include <cstdint>

namespace emulator {

struct Position {
  uint32_t row, col;
  bool operator==(const Position&) const = default;
};

// Row and column of a register's elements in an 8x8 matrix spread over a warp: lane 4i + j holds
// elements 2j and 2j + 1 of row i. Every other fragment is made of these.
constexpr Position matrix_8x8(uint32_t lane, uint32_t half) {
  return {lane / 4, 2 * (lane % 4) + half};
}

// The same of a matrix that ldmatrix or stmatrix transposes.
constexpr Position matrix_8x8_transposed(uint32_t lane, uint32_t half) {
  return {2 * (lane % 4) + half, lane / 4};
}

// The matrix of ldmatrix.xN and stmatrix.xN whose row `lane % 8` lies at this lane's address.
constexpr uint32_t matrix_of_address(uint32_t lane) { return lane / 8; }

// mma.m16n8k16: a[16, 16], register 0..3. The 8x8 matrices go down a column of a first.
constexpr Position mma_a(uint32_t lane, uint32_t reg, uint32_t half) {
  const Position at = matrix_8x8(lane, half);
  return {at.row + 8 * (reg % 2), at.col + 8 * (reg / 2)};
}

// mma.m16n8k16: b[16, 8] as (k, n), register 0..1. Each 8x8 matrix holds b transposed.
constexpr Position mma_b(uint32_t lane, uint32_t reg, uint32_t half) {
  const Position at = matrix_8x8_transposed(lane, half);
  return {at.row + 8 * reg, at.col};
}

// mma.m16n8k16: c and d[16, 8] in fp32, register 0..3.
constexpr Position mma_c(uint32_t lane, uint32_t reg) {
  const Position at = matrix_8x8(lane, reg % 2);
  return {at.row + 8 * (reg / 2), at.col};
}

// wgmma.m64nNk16: d[64, N] in fp32, thread 0..127 of the warpgroup, register 0..N/2-1. Warp w has
// rows 16w .. 16w+15, and runs of 8 columns are mma.m16n8k16's d fragments.
constexpr Position wgmma_d(uint32_t thread, uint32_t reg) {
  const Position at = mma_c(thread % 32, reg % 4);
  return {thread / 32 * 16 + at.row, reg / 4 * 8 + at.col};
}

// wgmma.m64nNk16: a[64, 16] in registers, register 0..3.
constexpr Position wgmma_a(uint32_t thread, uint32_t reg, uint32_t half) {
  const Position at = mma_a(thread % 32, reg, half);
  return {thread / 32 * 16 + at.row, at.col};
}

}  // namespace emulator
