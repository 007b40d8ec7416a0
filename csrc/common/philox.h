// The dropout mask of lora_ext: Philox-4x32 with 7 rounds, the same bits on every device.
//
// An element (row, col) is kept when its 16-bit draw is below keep_count, so that a keep
// probability is a multiple of 1/65536. One Philox call decides 8 elements of one row:
//
//     counter = (row_lo, group, 0, row_hi)     group = (col / 32) * 4 + (col % 8) / 2
//     key     = (seed_lo, seed_hi)
//     draw    = 16-bit half (col % 2) of word (col % 32) / 8
//
// In 32 consecutive columns, word j of the four calls holds columns 8j .. 8j+7 in order, as mma
// fragments and vector registers do. Rounds 1 and 2 split into a part that depends on the row and a
// part that depends on the column, so vector code computes each once (see cpu/simd_dropout.h).
//
// Philox: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011. Seven rounds are
// the fewest that pass BigCrush there.
#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace lora_ext::philox {

constexpr int kRounds = 7;
constexpr uint32_t kMul0 = 0xD2511F53u;
constexpr uint32_t kMul1 = 0xCD9E8D57u;
constexpr uint32_t kWeyl0 = 0x9E3779B9u;
constexpr uint32_t kWeyl1 = 0xBB67AE85u;
constexpr uint32_t kKeepOne = 65536;  // keep_count of a dropout that keeps everything

struct Words {
  uint32_t w[4];
};

struct Product {
  uint32_t low, high;
};
struct Multiply {
  LORA_EXT_HOST_DEVICE Product operator()(uint32_t a, uint32_t b) const {
    const uint64_t product = static_cast<uint64_t>(a) * b;
    return {static_cast<uint32_t>(product), static_cast<uint32_t>(product >> 32)};
  }
};

// Some kernels multiply by an instruction of their own (kernels/tile/mask.h).
template <class Multiplier = Multiply>
LORA_EXT_HOST_DEVICE Words draw(uint64_t seed, uint64_t row, uint32_t group,
                                const Multiplier& multiply = {}) {
  uint32_t c0 = static_cast<uint32_t>(row), c1 = group;
  uint32_t c2 = 0, c3 = static_cast<uint32_t>(row >> 32);
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < kRounds; ++round) {
    const Product p0 = multiply(kMul0, c0), p1 = multiply(kMul1, c2);
    c0 = p1.high ^ c1 ^ k0;
    c1 = p1.low;
    c2 = p0.high ^ c3 ^ k1;
    c3 = p0.low;
    k0 += kWeyl0;
    k1 += kWeyl1;
  }
  return {{c0, c1, c2, c3}};
}

LORA_EXT_HOST_DEVICE uint32_t group_of(uint64_t col) {
  return static_cast<uint32_t>(col / 32 * 4 + col % 8 / 2);
}

LORA_EXT_HOST_DEVICE bool kept(const Words& words, uint64_t col, uint32_t keep_count) {
  const uint32_t word = words.w[col % 32 / 8];
  return ((word >> (col % 2 * 16)) & 0xFFFFu) < keep_count;
}

// Keep probability in steps of 1/65536, never zero.
inline uint32_t keep_count_of(double dropout_p) {
  const double count = (1.0 - dropout_p) * kKeepOne + 0.5;
  return count < 1.0 ? 1u : static_cast<uint32_t>(count);
}

// The scale of inverted dropout for the rounded probability, which is the one that is used.
inline double keep_scale_of(uint32_t keep_count) {
  return static_cast<double>(kKeepOne) / keep_count;
}

}  // namespace lora_ext::philox

namespace lora_ext::kernel {

// The mask of a CUDA kernel's operand: that of (row_offset + row, col_offset + column). tile/mask.h
// draws it.
struct Mask {
  const int64_t* seed;  // on the device, so that the replay of a graph reads a new one
  int64_t row_offset, col_offset;
  uint32_t keep_count;
  float keep_scale;

  // Whether one draw decides exactly the 8 elements of a row that a lane holds in four fragments of
  // 8 columns, side by side, that begin at a multiple of 32.
  LORA_EXT_HOST_DEVICE bool aligned_to_draws() const;
};

}  // namespace lora_ext::kernel
