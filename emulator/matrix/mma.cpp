#include "emulator/matrix/mma.h"

#include <algorithm>
#include <cstddef>

#include "emulator/counts/counters.h"
#include "emulator/matrix/layouts.h"
#include "emulator/threads/warp.h"

namespace emulator {
namespace {

struct MmaOperand {
  float* d;
  const uint32_t* a;
  const uint32_t* b;
};

uint16_t element(uint32_t reg, uint32_t half) { return static_cast<uint16_t>(reg >> 16 * half); }

// All elements at once, so that the loop becomes vector code.
template <size_t kRows, size_t kColumns>
void widen_matrix(Format format, const uint16_t (&bits)[kRows][kColumns],
                  float (&values)[kRows][kColumns]) {
  for (size_t row = 0; row < kRows; ++row) {
    if (format == Format::kBFloat16) {
      for (size_t col = 0; col < kColumns; ++col) {
        values[row][col] = bfloat16_to_float(bits[row][col]);
      }
    } else {
      for (size_t col = 0; col < kColumns; ++col) {
        values[row][col] = float16_to_float(bits[row][col]);
      }
    }
  }
}

void multiply(Format format, const LaneOperands<MmaOperand>& lanes) {
  uint16_t a_bits[16][16], b_bits[16][8];
  float a[16][16], b[16][8], d[16][8];
  lanes.for_each([&](uint32_t lane, const MmaOperand& operand) {
    for (uint32_t half = 0; half < 2; ++half) {
      for (uint32_t reg = 0; reg < 4; ++reg) {
        const Position at = mma_a(lane, reg, half);
        a_bits[at.row][at.col] = element(operand.a[reg], half);
      }
      for (uint32_t reg = 0; reg < 2; ++reg) {
        const Position at = mma_b(lane, reg, half);
        b_bits[at.row][at.col] = element(operand.b[reg], half);
      }
    }
    for (uint32_t reg = 0; reg < 4; ++reg) {
      const Position at = mma_c(lane, reg);
      d[at.row][at.col] = operand.d[reg];
    }
  });
  widen_matrix(format, a_bits, a);
  widen_matrix(format, b_bits, b);
  count_mma(2 * 16 * 8 * 16);
  for (int row = 0; row < 16; ++row) {
    float sums[8];
    std::copy_n(d[row], 8, sums);
    for (int k = 0; k < 16; ++k) {
      for (int col = 0; col < 8; ++col) sums[col] += a[row][k] * b[k][col];
    }
    std::copy_n(sums, 8, d[row]);
  }
  lanes.for_each([&](uint32_t lane, const MmaOperand& operand) {
    for (uint32_t reg = 0; reg < 4; ++reg) {
      const Position at = mma_c(lane, reg);
      operand.d[reg] = d[at.row][at.col];
    }
  });
}

}  // namespace

void mma_m16n8k16(Format format, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  constexpr const char* kName = "mma.sync.m16n8k16";
  MmaOperand operand{d, a, b};
  warp_collective(aligned_mask(kName), kName, static_cast<uint64_t>(format), operand,
                  [format](const LaneOperands<MmaOperand>& lanes) { multiply(format, lanes); });
}

}  // namespace emulator
