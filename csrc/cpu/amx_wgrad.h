// wgrad on AMX tiles, G = T^T P, with the expand over the same columns.
// Included by isa_amx.cpp after its target pragma, inside its anonymous namespace.
#pragma once

// A line longer than the columns: the rows of a tile would share lines of the first cache.
constexpr int64_t kStagedPitch = 2 * kWgradCols + 32;

// Stages 32 rows of P, masked, two rows interleaved: dst[pair][column][2], pairs kStagedPitch apart.
// Rows past those of the range and columns past `cols` are zero.
template <bool kIsWhole>
void stage_pairs(const BFloat16* src, int64_t src_pitch, RowIndex index, Range range, int64_t cols,
                 MaskBits mask, BFloat16* dst) {
  const int64_t rows = range.end - range.begin;
  const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8,
                                       39, 7, 38, 6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
  const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  for (int64_t m = 0; m < kTileDepth; m += 2) {
    // A row that does not exist is not read: its lanes are masked off.
    const BFloat16* rows_at[2];
    for (int64_t i = 0; i < 2; ++i) {
      rows_at[i] = src + (m + i < rows ? index[range.begin + m + i] : 0) * src_pitch;
    }
    BFloat16* out = dst + m / 2 * kStagedPitch;
    for (int64_t c = 0; c < cols; c += kTileDepth, out += 2 * kTileDepth) {
      __m512i row[2];
      for (int64_t i = 0; i < 2; ++i) {
        uint32_t keep = kIsWhole ? 0xFFFFFFFFu : m + i < rows ? first_halves(cols - c) : 0u;
        if (!kIsWhole && mask.words != nullptr && m + i < rows) keep &= *mask.at(m + i, c).words;
        row[i] = _mm512_maskz_loadu_epi16(keep, rows_at[i] + c);
      }
      _mm512_store_si512(out, _mm512_permutex2var_epi16(row[0], low, row[1]));
      _mm512_store_si512(out + kTileDepth, _mm512_permutex2var_epi16(row[0], high, row[1]));
    }
  }
}

int64_t wgrad_t_bytes(int64_t rows, int64_t rank, bool /*u_is_half*/) {
  return round_up(rows, kTileDepth) * round_up(rank, kTileRows) * 2 * kHalfBytes;
}

// For each 32 rows T_hi^T and T_lo^T, zero-padded: [32 rows][term][rank_pad][32].
void pack_wgrad_t(const float* t, int64_t rank, bool /*u_is_half*/, Range rows, void* packed) {
  const int64_t rank_pad = round_up(rank, kTileRows);
  for (int64_t m = rows.begin; m < round_up(rows.end, kTileDepth); m += kTileDepth) {
    auto* hi = static_cast<BFloat16*>(packed) + m * rank_pad * 2;
    BFloat16* lo = hi + rank_pad * kTileDepth;
    for (int64_t j = 0; j < rank_pad; j += kTileRows) {
      const auto exists = static_cast<__mmask16>(first_halves(rank - j));
      const auto row = [&](int64_t i) {
        return Split(_mm512_maskz_loadu_ps(m + i < rows.end ? exists : 0, t + (m + i) * rank + j));
      };
      __m512i highs[kTileRows], lows[kTileRows];
      for (int64_t i = 0; i < kTileRows; ++i) {
        const Split even = row(2 * i), odd = row(2 * i + 1);
        highs[i] = interleave(even.hi, odd.hi), lows[i] = interleave(even.lo, odd.lo);
      }
      transpose_pairs(highs, hi + j * kTileDepth);
      transpose_pairs(lows, lo + j * kTileDepth);
    }
  }
}

// sums [16 ranks, 64 columns] += T^T P for 16 ranks of staged blocks of 32 rows.
void wgrad_tiles(const BFloat16* t, int64_t t_pitch, const BFloat16* p, int64_t p_pitch,
                 int64_t row_blocks, float* sums) {
  constexpr int64_t kSumStride = kColBlock * kFloatBytes;
  constexpr int64_t kPairStride = kStagedPitch * kHalfBytes;
  _tile_loadd(0, sums, kSumStride);
  _tile_loadd(1, sums + kTileRows, kSumStride);
  _tile_loadd(2, sums + 2 * kTileRows, kSumStride);
  _tile_loadd(3, sums + 3 * kTileRows, kSumStride);
  // Two products on the same sums are never next to each other: the second waits for the first.
  for (int64_t i = 0; i < row_blocks; ++i, t += 2 * t_pitch, p += p_pitch) {
    _tile_loadd(4, t, 64);
    _tile_loadd(5, t + t_pitch, 64);
    _tile_loadd(6, p, kPairStride);
    _tile_loadd(7, p + 2 * kTileRows, kPairStride);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(0, 5, 6);
    _tile_dpbf16ps(1, 5, 7);
    _tile_loadd(6, p + 4 * kTileRows, kPairStride);
    _tile_loadd(7, p + 6 * kTileRows, kPairStride);
    _tile_dpbf16ps(2, 4, 6);
    _tile_dpbf16ps(3, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, sums, kSumStride);
  _tile_stored(1, sums + kTileRows, kSumStride);
  _tile_stored(2, sums + 2 * kTileRows, kSumStride);
  _tile_stored(3, sums + 3 * kTileRows, kSumStride);
}

constexpr int64_t kStagedHalves = kWgradRows / 2 * kStagedPitch;

int64_t wgrad_slab(int64_t rank_pad) {
  return std::min(kWgradCols, kMaxRank / rank_pad * kColBlock);
}

int64_t wgrad_bytes(int64_t rank) {
  const int64_t rank_pad = round_up(rank, kTileRows);
  return kStagedHalves * kHalfBytes + rank_pad * wgrad_slab(rank_pad) * kFloatBytes;
}

// Columns go in slabs whose sums fit 128 KB; some rows of a slab are staged at a time, so that memory
// is read along the rows.
void wgrad(const WgradArgs& args, const ExpandArgs& expand, Range cols) {
  const TileConfig config;
  constexpr int64_t kBitsPitch = kWgradCols / 32;
  const int64_t rank_pad = round_up(args.rank, kTileRows), t_pitch = rank_pad * kTileDepth;
  const int64_t slab = wgrad_slab(rank_pad);
  const int64_t p_pitch = kStagedPitch * kTileRows;
  const bool drop = args.dropout.enabled();
  auto* staged = static_cast<BFloat16*>(args.work);  // kStagedHalves
  auto* sums = reinterpret_cast<float*>(staged + kStagedHalves);
  uint32_t bits[kTileDepth * kBitsPitch];
  for (int64_t c0 = cols.begin; c0 < cols.end; c0 += slab) {
    const int64_t c1 = std::min(c0 + slab, cols.end), slab_cols = c1 - c0;
    std::memset(sums, 0,
                static_cast<size_t>(rank_pad * round_up(slab_cols, kColBlock)) * sizeof(float));
    // Of columns past the last that are multiplied with the others.
    if (slab_cols % kColBlock != 0) std::memset(staged, 0, kStagedHalves * kHalfBytes);
    for (int64_t m0 = 0; m0 < args.rows; m0 += kWgradRows) {
      const int64_t m1 = std::min(m0 + kWgradRows, args.rows);
      const auto* t = static_cast<const BFloat16*>(args.t) + m0 * rank_pad * 2;
      for (int64_t m = m0; m < m1; m += kTileDepth) {
        const Range block{m, std::min(m + kTileDepth, args.rows)};
        MaskBits mask = args.mask.at(m, c0);
        if (drop && mask.words == nullptr) {
          mask = {bits, kBitsPitch};
          dropout_bits<AmxDropout>(args.dropout, args.row_index, block, {c0, c1}, bits, kBitsPitch);
        }
        const bool is_whole = !drop && slab_cols % kTileDepth == 0 && m + kTileDepth <= args.rows;
        (is_whole ? stage_pairs<true>
                  : stage_pairs<false>)(static_cast<const BFloat16*>(args.p) + c0, args.p_pitch,
                                        args.row_index, block, slab_cols, mask,
                                        staged + (m - m0) / 2 * kStagedPitch);
        if (expand.y == nullptr) continue;
        for (int64_t c = 0; c < slab_cols; c += kColBlock) {
          expand_block(expand, m, block.end - m, c0 + c, drop ? mask.at(0, c).words : nullptr,
                       mask.pitch);
        }
      }
      for (int64_t c = 0; c < slab_cols; c += kColBlock) {
        for (int64_t j = 0; j < rank_pad; j += kTileRows) {
          wgrad_tiles(t + j * kTileDepth, t_pitch, staged + 2 * c, p_pitch,
                      (m1 - m0 + kTileDepth - 1) / kTileDepth, sums + c * rank_pad + j * kColBlock);
        }
      }
    }
    for (int64_t c = c0; c < c1; c += kColBlock) {
      store_wgrad(args, {c, std::min(c + kColBlock, c1)}, sums + (c - c0) * rank_pad, kColBlock);
    }
  }
}
