// Dropout bits of a block, in vector code of the including file's instruction set.
//
// Included after `#pragma GCC target`, inside an anonymous namespace per file. The first two Philox
// rounds are split by hand (philox.h): with counter (row_lo, group, 0, row_hi)
//
//     round 1   c0 = group ^ k0                        depends on the group
//               c2 = hi(M0 row_lo) ^ row_hi ^ k1       depends on the row
//               c3 = lo(M0 row_lo)                     depends on the row
//     round 2   c0 = hi(M1 c2) ^ k0'                   depends on the row
//               c1 = lo(M1 c2)                         depends on the row
//               c2 = hi(M0 (group ^ k0)) ^ c3 ^ k1'    the product: table of groups
//               c3 = lo(M0 (group ^ k0))               table of groups
//
// which leaves 9 of 14 multiplications per call. Isa::kDropoutWords words are computed at a time by
// Isa::dropout_words(table, DropoutRow, keys, keep_count, words).
#pragma once

struct DropoutKeys {
  uint32_t k0[philox::kRounds];
  uint32_t k1[philox::kRounds];

  explicit DropoutKeys(uint64_t seed) {
    k0[0] = static_cast<uint32_t>(seed);
    k1[0] = static_cast<uint32_t>(seed >> 32);
    for (int round = 1; round < philox::kRounds; ++round) {
      k0[round] = k0[round - 1] + philox::kWeyl0;
      k1[round] = k1[round - 1] + philox::kWeyl1;
    }
  }
};

// Results of rounds 1 and 2 that depend only on the row; c2 and c3 of round 2 still need the
// product of the group.
struct DropoutRow {
  uint32_t c0, c1;   // after round 2
  uint32_t c2_part;  // c3 of round 1, xor k1'; xor hi(product) gives c2 of round 2

  DropoutRow(uint64_t row, const DropoutKeys& keys) {
    const uint64_t p0 = uint64_t{philox::kMul0} * static_cast<uint32_t>(row);
    const uint32_t c2 =
        static_cast<uint32_t>(p0 >> 32) ^ static_cast<uint32_t>(row >> 32) ^ keys.k1[0];
    const uint64_t p1 = uint64_t{philox::kMul1} * c2;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ keys.k0[1];
    c1 = static_cast<uint32_t>(p1);
    c2_part = static_cast<uint32_t>(p0) ^ keys.k1[1];
  }
};

// Rounds 3 to 7 without vectors: philox::draw of the row and the group of the product.
inline philox::Words dropout_draw(uint64_t product, const DropoutRow& row,
                                  const DropoutKeys& keys) {
  uint32_t c0 = row.c0, c1 = row.c1;
  uint32_t c2 = static_cast<uint32_t>(product >> 32) ^ row.c2_part;
  uint32_t c3 = static_cast<uint32_t>(product);
  for (int round = 2; round < philox::kRounds; ++round) {
    const uint64_t p0 = uint64_t{philox::kMul0} * c0;
    const uint64_t p1 = uint64_t{philox::kMul1} * c2;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ keys.k0[round];
    c1 = static_cast<uint32_t>(p1);
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ keys.k1[round];
    c3 = static_cast<uint32_t>(p0);
  }
  return {{c0, c1, c2, c3}};
}

// 512 columns at a time: 64 groups of products, 512 B of table.
constexpr int64_t kDropoutSlab = 512;

template <class Isa>
void dropout_bits(const Dropout& dropout, RowIndex index, Range rows, Range cols, uint32_t* bits,
                  int64_t pitch) {
  const DropoutKeys keys(dropout.seed);
  const uint64_t first_col = static_cast<uint64_t>(dropout.col_offset + cols.begin);
  const int shift = static_cast<int>(first_col % 32);
  const int64_t num_words = (cols.end - cols.begin + 31) / 32;
  constexpr int64_t kSlabWords = kDropoutSlab / 32;
  for (int64_t word0 = 0; word0 < num_words; word0 += kSlabWords) {
    const int64_t out_words = std::min(kSlabWords, num_words - word0);
    // One word more than asked for feeds the funnel shift of a misaligned first column.
    const int64_t draw_words = out_words + (shift != 0);
    uint64_t products[(kSlabWords + 2 * Isa::kDropoutWords) * 4];
    uint32_t words[kSlabWords + 2 * Isa::kDropoutWords];
    const uint64_t group0 = (first_col / 32 + word0) * 4;
    const int64_t rounded = (draw_words + Isa::kDropoutWords - 1) / Isa::kDropoutWords;
    for (int64_t i = 0; i < rounded * Isa::kDropoutWords * 4; ++i) {
      products[i] = uint64_t{philox::kMul0} * (static_cast<uint32_t>(group0 + i) ^ keys.k0[0]);
    }
    for (int64_t m = rows.begin; m < rows.end; ++m) {
      const DropoutRow row(static_cast<uint64_t>(dropout.mask_row(index[m])), keys);
      uint32_t* out = bits + (m - rows.begin) * pitch + word0;
      const bool fits = shift == 0 && rounded * Isa::kDropoutWords == out_words;
      uint32_t* drawn = fits ? out : words;
      for (int64_t i = 0; i < rounded; ++i) {
        Isa::dropout_words(products + i * Isa::kDropoutWords * 4, row, keys, dropout.keep_count,
                           drawn + i * Isa::kDropoutWords);
      }
      if (fits) continue;
      if (shift == 0) {
        for (int64_t i = 0; i < out_words; ++i) out[i] = words[i];
      } else {
        for (int64_t i = 0; i < out_words; ++i) {
          out[i] = words[i] >> shift | words[i + 1] << (32 - shift);
        }
      }
    }
  }
}
