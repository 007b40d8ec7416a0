// mma.sync.m16n8k16: d[16, 8] += a[16, 16] b[16, 8] of one warp, 16-bit operands, fp32
// accumulators.
//
// A product of two bf16 or two fp16 numbers is exact in fp32 (8 + 8 or 11 + 11 significant bits).
// The products of an element are added to its accumulator in the order k = 0, 1, .. 15, with one
// rounding to fp32 a step. A tensor core's order and rounding are undocumented: compare with a
// bound, K x 2^-23 x sum |a||b|, and not bit by bit.
#pragma once

#include <cstdint>

#include "emulator/matrix/formats.h"

namespace emulator {

void mma_m16n8k16(Format format, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

}  // namespace emulator
