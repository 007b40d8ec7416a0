// expand on AMX tiles: Y += scale * mask * (T U).
// Included by isa_amx.cpp after its target pragma, inside its anonymous namespace.
#pragma once

void pack_expand_t(const float* t, int64_t rank, bool u_is_half, Range rows, void* packed) {
  pack_scaled_t(t, rank, u_is_half, rows, 1.0f, packed);
}

// y[m, c] += scale * keep(m, c) * sum[m, c] for 16 columns, of which `cols` exist.
inline void add_columns(BFloat16* y, int64_t cols, uint32_t keep, __m512 scale, const float* sum) {
  const auto exists = static_cast<__mmask16>((1u << cols) - 1);
  const __m512 delta =
      _mm512_maskz_mul_ps(static_cast<__mmask16>(keep), _mm512_load_ps(sum), scale);
  const __m512 old = to_wide(_mm256_maskz_loadu_epi16(exists, y));
  _mm256_mask_storeu_epi16(y, exists, to_half(_mm512_add_ps(old, delta)));
}

// The same for 32 whole columns: one load, one conversion and one store for two sums.
inline void add_columns32(BFloat16* y, uint32_t keep, __m512 scale, const float* sum) {
  const __m512 delta0 =
      _mm512_maskz_mul_ps(static_cast<__mmask16>(keep), _mm512_load_ps(sum), scale);
  const __m512 delta1 =
      _mm512_maskz_mul_ps(static_cast<__mmask16>(keep >> 16), _mm512_load_ps(sum + 16), scale);
  const __m512 old0 = to_wide(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(y)));
  const __m512 old1 = to_wide(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(y + 16)));
  const __m512bh rounded =
      _mm512_cvtne2ps_pbh(_mm512_add_ps(old1, delta1), _mm512_add_ps(old0, delta0));
  std::memcpy(y, &rounded, sizeof(rounded));
}

// A block of at most 32 rows by 64 columns at (row, col).
void expand_block(const ExpandArgs& args, int64_t row, int64_t rows, int64_t col,
                  const uint32_t* bits, int64_t bits_pitch) {
  alignas(64) float sums[kRowBlock * kColBlock];
  const int64_t depth = expand_depth(args.rank, args.u_is_half);
  const auto* t = static_cast<const BFloat16*>(args.t) + row * depth;
  const auto* u = static_cast<const BFloat16*>(args.u) + col * depth;
  constexpr int64_t kSumStride = kColBlock * kFloatBytes;
  for (int64_t pair = 0; pair < kColBlock; pair += 2 * kTileRows) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t k = 0; k < depth; k += kTileDepth) {
      _tile_loadd(4, t + k, depth * kHalfBytes);
      _tile_loadd(5, t + kTileRows * depth + k, depth * kHalfBytes);
      _tile_loadd(6, u + pair * depth + k * kTileRows, 64);
      _tile_loadd(7, u + (pair + kTileRows) * depth + k * kTileRows, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 5, 6);
      _tile_dpbf16ps(2, 4, 7);
      _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, sums + pair, kSumStride);
    _tile_stored(1, sums + kTileRows * kColBlock + pair, kSumStride);
    _tile_stored(2, sums + pair + kTileRows, kSumStride);
    _tile_stored(3, sums + kTileRows * kColBlock + pair + kTileRows, kSumStride);
  }
  static constexpr uint32_t kKeepAll[kColBlock / 32] = {0xFFFFFFFFu, 0xFFFFFFFFu};
  const __m512 scale = _mm512_set1_ps(args.scale);
  const int64_t cols = std::min(kColBlock, args.cols - col);
  for (int64_t m = 0; m < rows; ++m) {
    BFloat16* y = static_cast<BFloat16*>(args.y) + args.rows[row + m] * args.y_pitch + col;
    const uint32_t* keep_row = bits == nullptr ? kKeepAll : bits + m * bits_pitch;
    if (cols == kColBlock) {
      add_columns32(y, keep_row[0], scale, sums + m * kColBlock);
      add_columns32(y + 32, keep_row[1], scale, sums + m * kColBlock + 32);
      continue;
    }
    for (int64_t c = 0; c < cols; c += kTileRows) {
      const uint32_t keep = keep_row[c / 32] >> (c % 32);
      add_columns(y + c, std::min(kTileRows, cols - c), keep, scale, sums + m * kColBlock + c);
    }
  }
}

void expand(const ExpandArgs& args, Range rows) {
  const TileConfig config;
  const bool drop = args.dropout.enabled();
  constexpr int64_t kMaskCols = 512;
  uint32_t bits[kRowBlock * kMaskCols / 32];
  for (int64_t m = rows.begin; m < rows.end; m += kRowBlock) {
    const int64_t block_rows = std::min(kRowBlock, rows.end - m);
    for (int64_t c = 0; c < args.cols; c += kColBlock) {
      if (drop && c % kMaskCols == 0) {
        dropout_bits<AmxDropout>(args.dropout, args.rows, {m, m + block_rows},
                                 {c, std::min(c + kMaskCols, args.cols)}, bits, kMaskCols / 32);
      }
      expand_block(args, m, block_rows, c, drop ? bits + c % kMaskCols / 32 : nullptr,
                   kMaskCols / 32);
    }
  }
}
