// The dropout mask from its definition (docs/numerics.md), one element at a time. Shares nothing
// with csrc/common/philox.h.
#pragma once
#include <array>
#include <cstdint>

namespace kernels {

struct ReferenceMask {
  uint64_t seed;
  int64_t row_offset, col_offset;
  uint32_t keep_count;

  // Philox-4x32 (Salmon et al., SC 2011), seven rounds.
  static std::array<uint32_t, 4> philox(std::array<uint32_t, 4> counter,
                                        std::array<uint32_t, 2> key) {
    for (uint32_t round = 0; round < 7; ++round) {
      const uint64_t product0 = uint64_t{3528531795} * counter[0];
      const uint64_t product1 = uint64_t{3449720151} * counter[2];
      const uint32_t key0 = key[0] + round * 2654435769u, key1 = key[1] + round * 3144134277u;
      counter = {static_cast<uint32_t>(product1 >> 32) ^ counter[1] ^ key0,
                 static_cast<uint32_t>(product1),
                 static_cast<uint32_t>(product0 >> 32) ^ counter[3] ^ key1,
                 static_cast<uint32_t>(product0)};
    }
    return counter;
  }

  bool kept(int row, int column) const {
    const auto r = static_cast<uint64_t>(row_offset + row);
    const auto c = static_cast<uint64_t>(col_offset + column);
    const std::array<uint32_t, 4> words =
        philox({static_cast<uint32_t>(r), static_cast<uint32_t>(c / 32 * 4 + c % 8 / 2), 0,
                static_cast<uint32_t>(r >> 32)},
               {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)});
    return (words[c % 32 / 8] >> (c % 2 ? 16 : 0) & 0xFFFF) < keep_count;
  }
};

}  // namespace kernels
