// P's rows and Q's columns in tiles, for the layer in one pass on AMX tiles.
// Included by isa_amx.cpp after its target pragma, inside its anonymous namespace.
#pragma once

// Some steps of 32 rows of P in tiles; those from `count` on are zeros. kIsMasked: only what has a bit
// set, for the rows and steps.
template <bool kIsMasked>
void pack_p(const BFloat16* const* rows, int64_t count, int64_t depth, Range steps, MaskBits keep,
            BFloat16* to) {
  constexpr int64_t kAtOnce = 4;
  for (int64_t first = steps.begin; first < steps.end; first += kAtOnce) {
    const int64_t end = std::min(first + kAtOnce, steps.end);
    for (int64_t i = 0; i < kRowBlock; ++i) {
      for (int64_t k = first; k < end; ++k) {
        const int64_t left = i < count ? depth - k * kTileDepth : 0;
        __mmask32 exists = first_halves(left);
        if (kIsMasked && i < count) exists &= keep.words[i * keep.pitch + k - steps.begin];
        _mm512_store_si512(to + (k - steps.begin) * kStepElements + i * kTileDepth,
                           _mm512_maskz_loadu_epi16(exists, rows[i] + k * kTileDepth));
      }
    }
  }
}

// Q's columns of a task, for an outer block of the depth: [32 columns][pitch of depths].
void pack_q(const FusedProduct& product, const ProductTask& task, const Depths& depths, Range outer,
            BFloat16* to) {
  const MatrixView& q = product.q;
  const auto* in = static_cast<const BFloat16*>(task.part->q) + task.cols.begin * q.col_pitch;
  const int64_t cols = task.cols.end - task.cols.begin;
  const int64_t blocks = round_up(cols, kRowBlock) / kRowBlock;
  const auto tiles_at = [&](int64_t block, int64_t step) {
    return to + block * depths.pitch() + (step - outer.begin) * kStepElements;
  };
  if (q.depth_pitch == 1) {
    for (int64_t c = 0; c < blocks * kRowBlock; c += kTileRows) {
      for (int64_t k = outer.begin; k < outer.end; ++k) {
        const __mmask32 exists = first_halves(product.depth - k * kTileDepth);
        const BFloat16* at = in + c * q.col_pitch + k * kTileDepth;
        __m512i rows[kTileRows];
        for (int64_t i = 0; i < kTileRows; ++i) {
          rows[i] = _mm512_maskz_loadu_epi16(c + i < cols ? exists : 0u, at + i * q.col_pitch);
        }
        transpose_pairs(rows, tiles_at(c / kRowBlock, k) + c % kRowBlock * kTileDepth);
      }
    }
    return;
  }
  alignas(64) BFloat16 gathered[kRowBlock];
  const auto row_at = [&](int64_t d, int64_t c) {
    const __mmask32 exists = d < product.depth ? first_halves(cols - c) : 0u;
    const BFloat16* at = in + d * q.depth_pitch + c * q.col_pitch;
    if (q.col_pitch == 1) {
      __builtin_prefetch(at + 16 * q.depth_pitch);
      return _mm512_maskz_loadu_epi16(exists, at);
    }
    for (int64_t i = 0; i < kRowBlock; ++i) {
      if ((exists >> i & 1u) != 0) gathered[i] = at[i * q.col_pitch];
    }
    return _mm512_maskz_loadu_epi16(exists, gathered);
  };
  for (int64_t d = outer.begin * kTileDepth; d < outer.end * kTileDepth; d += 2) {
    for (int64_t block = 0; block < blocks; ++block) {
      const __m512i even = row_at(d, block * kRowBlock), odd = row_at(d + 1, block * kRowBlock);
      BFloat16* out = tiles_at(block, d / kTileDepth) + d % kTileDepth * kTileRows;
      _mm512_store_si512(out,
                         interleave(_mm512_castsi512_si256(even), _mm512_castsi512_si256(odd)));
      _mm512_store_si512(out + kTileElements, interleave(_mm512_extracti64x4_epi64(even, 1),
                                                         _mm512_extracti64x4_epi64(odd, 1)));
    }
  }
}
