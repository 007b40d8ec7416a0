// expand on AMX tiles: Y += scale * mask * (T U).
// Included by isa_amx.cpp after its target pragma, inside its anonymous namespace.
#pragma once

int64_t expand_terms(bool u_is_half) { return u_is_half ? 2 : 3; }

int64_t expand_depth(int64_t rank, bool u_is_half) {
  return round_up(rank * expand_terms(u_is_half), kTileDepth);
}

// Panel: for each 16 columns, each 32 inner elements, one B tile: [16 inner pairs][16 columns][2].
int64_t expand_panel_bytes(int64_t rank, int64_t cols) {
  return round_up(cols, kColBlock) * expand_depth(rank, false) * kHalfBytes;
}

void pack_expand(const AdapterView& adapter, void* panel) {
  const bool is_half = adapter.dtype == Dtype::kBFloat16;
  const int64_t inner = adapter.rank * expand_terms(is_half);
  const int64_t depth = expand_depth(adapter.rank, is_half);
  auto* out = static_cast<BFloat16*>(panel);
  for (int64_t c = 0; c < round_up(adapter.cols, kColBlock); c += kTileRows) {
    const int64_t cols = std::clamp<int64_t>(adapter.cols - c, 0, kTileRows);
    if (adapter.rank_pitch == 1) {
      // A column's terms beside each other; pairs of ranks are transposed.
      alignas(64) BFloat16 rows[kTileRows][kMaxRank * 3];
      for (int64_t i = 0; i < kTileRows; ++i) {
        std::fill(rows[i] + (i < cols ? inner : 0), rows[i] + depth, BFloat16{0});
        for (int64_t j = 0; i < cols && j < adapter.rank; j += kTileRows) {
          const int64_t left = adapter.rank - j, index = (c + i) * adapter.col_pitch + j;
          const auto exists = static_cast<__mmask16>(first_halves(left));
          const Split value(load_adapter(adapter, index, 1, left));
          _mm256_mask_storeu_epi16(rows[i] + j, exists, value.hi);
          _mm256_mask_storeu_epi16(rows[i] + adapter.rank + j, exists, value.hi);
          if (is_half) continue;
          _mm256_mask_storeu_epi16(rows[i] + 2 * adapter.rank + j, exists, value.lo);
        }
      }
      for (int64_t k = 0; k < depth; k += kTileDepth, out += kTileElements) {
        __m512i pairs[kTileRows];
        for (int64_t i = 0; i < kTileRows; ++i) pairs[i] = _mm512_load_si512(rows[i] + k);
        transpose_pairs(pairs, out);
      }
      continue;
    }
    // Inner element k is rank index k % rank of term k / rank: hi, hi, lo.
    const auto inner_row = [&](int64_t k) {
      if (k >= inner || cols == 0) return _mm256_setzero_si256();
      const int64_t index = k % adapter.rank * adapter.rank_pitch + c * adapter.col_pitch;
      if (is_half && adapter.col_pitch == 1) {
        const auto* in = static_cast<const BFloat16*>(adapter.data) + index;
        return _mm512_castsi512_si256(_mm512_maskz_loadu_epi16(first_halves(cols), in));
      }
      const Split value(load_adapter(adapter, index, adapter.col_pitch, cols));
      return k / adapter.rank == 2 ? value.lo : value.hi;
    };
    for (int64_t k = 0; k < depth; k += 2, out += kTileDepth) {
      _mm512_store_si512(out, interleave(inner_row(k), inner_row(k + 1)));
    }
  }
}

int64_t expand_t_bytes(int64_t rows, int64_t rank, bool u_is_half) {
  return round_up(rows, kRowBlock) * expand_depth(rank, u_is_half) * kHalfBytes;
}

// packed[m] = scale [T_hi T_lo (T_hi)], zero beyond the rows in the last block of 32: [rows_pad, depth].
void pack_scaled_t(const float* t, int64_t rank, bool u_is_half, Range rows, float scale,
                   void* packed) {
  const int64_t depth = expand_depth(rank, u_is_half);
  auto* out = static_cast<BFloat16*>(packed) + rows.begin * depth;
  const int64_t rows_pad = round_up(rows.end - rows.begin, kRowBlock);
  std::memset(out, 0, static_cast<size_t>(rows_pad * depth) * sizeof(BFloat16));
  const __m512 factor = _mm512_set1_ps(scale);
  for (int64_t m = rows.begin; m < rows.end; ++m, out += depth) {
    for (int64_t j = 0; j < rank; j += 16) {
      const auto exists = static_cast<__mmask16>(first_halves(rank - j));
      const Split value(_mm512_mul_ps(_mm512_maskz_loadu_ps(exists, t + m * rank + j), factor));
      _mm256_mask_storeu_epi16(out + j, exists, value.hi);
      _mm256_mask_storeu_epi16(out + rank + j, exists, value.lo);
      if (!u_is_half) _mm256_mask_storeu_epi16(out + 2 * rank + j, exists, value.hi);
    }
  }
}

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
