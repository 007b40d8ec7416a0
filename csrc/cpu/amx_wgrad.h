// wgrad on AMX tiles, G = T^T P, with the expand over the same columns.
// Included by isa_amx.cpp after its target pragma, inside its anonymous namespace.
#pragma once

// Stages P for 64 columns and an even number of rows, masked, two rows interleaved:
// dst[pair][column][2]; rows past `rows` and columns past `cols` are zero.
void stage_pairs(const BFloat16* src, int64_t src_pitch, RowIndex index, Range range,
                 int64_t rows_pad, int64_t cols, const uint32_t* bits, int64_t bits_pitch,
                 BFloat16* dst) {
  const int64_t rows = range.end - range.begin;
  // The next block's rows come from memory, and no hardware prefetches so many streams.
  const int64_t ahead = index.at == nullptr ? kWgradRows * src_pitch : 0;
  // A row that does not exist is not read: its lanes are masked off.
  const auto row_at = [&](int64_t m) {
    return src + (m < rows ? index[range.begin + m] : 0) * src_pitch;
  };
  const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8,
                                       39, 7, 38, 6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
  const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  for (int64_t m = 0; m < rows_pad; m += 2) {
    BFloat16* out = dst + m * kColBlock;
    const BFloat16 *even = row_at(m), *odd = row_at(m + 1);
    for (int64_t c = 0; c < kColBlock; c += kTileDepth) {
      const int64_t exist = std::clamp<int64_t>(cols - c, 0, kTileDepth);
      const uint32_t inside = exist == kTileDepth ? 0xFFFFFFFFu : (1u << exist) - 1;
      _mm_prefetch(reinterpret_cast<const char*>(even + ahead + c), _MM_HINT_T1);
      _mm_prefetch(reinterpret_cast<const char*>(odd + ahead + c), _MM_HINT_T1);
      uint32_t keep0 = m < rows ? inside : 0u;
      uint32_t keep1 = m + 1 < rows ? inside : 0u;
      if (bits != nullptr && m < rows) keep0 &= bits[m * bits_pitch + c / 32];
      if (bits != nullptr && m + 1 < rows) keep1 &= bits[(m + 1) * bits_pitch + c / 32];
      const __m512i row0 = _mm512_maskz_loadu_epi16(keep0, even + c);
      const __m512i row1 = _mm512_maskz_loadu_epi16(keep1, odd + c);
      _mm512_storeu_si512(out + c * 2, _mm512_permutex2var_epi16(row0, low, row1));
      _mm512_storeu_si512(out + c * 2 + 32, _mm512_permutex2var_epi16(row0, high, row1));
    }
  }
}

int64_t wgrad_t_bytes(int64_t rows, int64_t rank, bool /*u_is_half*/) {
  return round_up(rows, kWgradRows) * round_up(rank, kTileRows) * 2 * kHalfBytes;
}

// For each block of rows T_hi^T and T_lo^T, zero-padded: [block][term][rank_pad][kWgradRows].
void pack_wgrad_t(const float* t, int64_t rank, bool /*u_is_half*/, Range rows, void* packed) {
  const int64_t rank_pad = round_up(rank, kTileRows);
  for (int64_t m0 = rows.begin; m0 < rows.end; m0 += kWgradRows) {
    auto* hi = static_cast<BFloat16*>(packed) + m0 * rank_pad * 2;
    BFloat16* lo = hi + rank_pad * kWgradRows;
    std::memset(hi, 0, static_cast<size_t>(2 * rank_pad * kWgradRows) * sizeof(BFloat16));
    for (int64_t m = m0; m < std::min(m0 + kWgradRows, rows.end); ++m) {
      for (int64_t j = 0; j < rank; j += 16) {
        const int64_t count = std::min<int64_t>(16, rank - j);
        const auto exists = static_cast<__mmask16>((1u << count) - 1);
        const Split value(_mm512_maskz_loadu_ps(exists, t + m * rank + j));
        alignas(32) BFloat16 values[2][16];
        _mm256_store_si256(reinterpret_cast<__m256i*>(values[0]), value.hi);
        _mm256_store_si256(reinterpret_cast<__m256i*>(values[1]), value.lo);
        for (int64_t i = 0; i < count; ++i) {
          hi[(j + i) * kWgradRows + m - m0] = values[0][i];
          lo[(j + i) * kWgradRows + m - m0] = values[1][i];
        }
      }
    }
  }
}

// sums [16 ranks, 64 columns] += T^T P for one rank tile of a staged block.
void wgrad_tiles(const BFloat16* t_hi, const BFloat16* t_lo, const BFloat16* p, int64_t rows,
                 float* sums) {
  constexpr int64_t kSumStride = kColBlock * kFloatBytes;
  constexpr int64_t kPairStride = 2 * kColBlock * kHalfBytes;
  _tile_loadd(0, sums, kSumStride);
  _tile_loadd(1, sums + kTileRows, kSumStride);
  _tile_loadd(2, sums + 2 * kTileRows, kSumStride);
  _tile_loadd(3, sums + 3 * kTileRows, kSumStride);
  for (int64_t m = 0; m < rows; m += kTileDepth) {
    const BFloat16* b = p + m * kColBlock;
    _tile_loadd(4, t_hi + m, kWgradRows * kHalfBytes);
    _tile_loadd(5, t_lo + m, kWgradRows * kHalfBytes);
    _tile_loadd(6, b, kPairStride);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(0, 5, 6);
    _tile_loadd(7, b + 2 * kTileRows, kPairStride);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(1, 5, 7);
    _tile_loadd(6, b + 4 * kTileRows, kPairStride);
    _tile_dpbf16ps(2, 4, 6);
    _tile_dpbf16ps(2, 5, 6);
    _tile_loadd(7, b + 6 * kTileRows, kPairStride);
    _tile_dpbf16ps(3, 4, 7);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, sums, kSumStride);
  _tile_stored(1, sums + kTileRows, kSumStride);
  _tile_stored(2, sums + 2 * kTileRows, kSumStride);
  _tile_stored(3, sums + 3 * kTileRows, kSumStride);
}

// Columns go in slabs whose sums fit 128 KB; a row block draws the mask of a whole slab.
void wgrad(const WgradArgs& args, const ExpandArgs& expand, Range cols) {
  const TileConfig config;
  constexpr int64_t kMaxSlab = 512;
  constexpr int64_t kBitsPitch = kMaxSlab / 32;
  constexpr int64_t kSums = kMaxRank * kColBlock;
  const int64_t rank_pad = round_up(args.rank, kTileRows);
  const int64_t slab = std::min(kMaxSlab, kSums / rank_pad / kColBlock * kColBlock);
  const bool drop = args.dropout.enabled();
  alignas(64) BFloat16 staged[kWgradRows * kColBlock];
  alignas(64) float sums[kSums];
  uint32_t bits[kWgradRows * kBitsPitch];
  for (int64_t c0 = cols.begin; c0 < cols.end; c0 += slab) {
    const int64_t c1 = std::min(c0 + slab, cols.end);
    std::memset(sums, 0,
                static_cast<size_t>(rank_pad * round_up(c1 - c0, kColBlock)) * sizeof(float));
    for (int64_t m = 0; m < args.rows; m += kWgradRows) {
      const int64_t block_rows = std::min(kWgradRows, args.rows - m);
      const int64_t rows_pad = round_up(block_rows, kTileDepth);
      const Range block{m, m + block_rows};
      const auto* t = static_cast<const BFloat16*>(args.t) + m * rank_pad * 2;
      MaskBits mask = args.mask.at(m, c0);
      if (drop && mask.words == nullptr) {
        mask = {bits, kBitsPitch};
        dropout_bits<AmxDropout>(args.dropout, args.row_index, block, {c0, c1}, bits, kBitsPitch);
      }
      for (int64_t c = c0; c < c1; c += kColBlock) {
        const int64_t block_cols = std::min(kColBlock, c1 - c);
        const uint32_t* keep = mask.at(0, c - c0).words;
        stage_pairs(static_cast<const BFloat16*>(args.p) + c, args.p_pitch, args.row_index, block,
                    rows_pad, block_cols, keep, mask.pitch, staged);
        float* block_sums = sums + (c - c0) * rank_pad;
        for (int64_t j = 0; j < rank_pad; j += kTileRows) {
          wgrad_tiles(t + j * kWgradRows, t + (rank_pad + j) * kWgradRows, staged, rows_pad,
                      block_sums + j * kColBlock);
        }
        if (expand.y == nullptr) continue;
        for (int64_t i = 0; i < block_rows; i += kRowBlock) {
          expand_block(expand, m + i, std::min(kRowBlock, block_rows - i), c,
                       drop ? keep + i * mask.pitch : nullptr, mask.pitch);
        }
      }
    }
    for (int64_t c = c0; c < c1; c += kColBlock) {
      store_wgrad(args, {c, std::min(c + kColBlock, c1)}, sums + (c - c0) * rank_pad, kColBlock);
    }
  }
}
