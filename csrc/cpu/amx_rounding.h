// Sums of the layer in one pass on AMX tiles, rounded and stored a row at a time, among products.
// Included by isa_amx.cpp after its target pragma, inside its anonymous namespace.
#pragma once

// Rows of a block that are still to be rounded and stored.
struct Rounding {
  const float *sums = nullptr, *added = nullptr;  // the second: under dropout
  const uint32_t* keep = nullptr;
  int64_t keep_pitch = 0;
  const TileArgs* tile = nullptr;
  BFloat16* y = nullptr;  // row 0 of the layer, at the block's first column
  __mmask32 exists = 0;
  const BFloat16* bias = nullptr;
  int64_t first = 0, row = 0, end = 0;

  bool is_done() const { return row >= end; }
  void one() {
    const float* sum = sums + row * kTileRows;
    __m512 low = _mm512_load_ps(sum), high = _mm512_load_ps(sum + kSumTiles / 2);
    if (bias != nullptr) {
      const __m512i value = _mm512_maskz_loadu_epi16(exists, bias);
      low = _mm512_add_ps(low, to_wide(_mm512_castsi512_si256(value)));
      high = _mm512_add_ps(high, to_wide(_mm512_extracti64x4_epi64(value, 1)));
    }
    if (added != nullptr) {
      const uint32_t kept = keep[row * keep_pitch];
      const float* more = added + row * kTileRows;
      low = _mm512_mask_add_ps(low, static_cast<__mmask16>(kept), low, _mm512_load_ps(more));
      high = _mm512_mask_add_ps(high, static_cast<__mmask16>(kept >> 16), high,
                                _mm512_load_ps(more + kSumTiles / 2));
    }
    const __m512bh rounded = _mm512_cvtne2ps_pbh(high, low);
    __m512i bits;
    std::memcpy(&bits, &rounded, sizeof(bits));
    BFloat16* to = y + tile->rows[first + row++] * tile->y_pitch;
    if (exists == 0xFFFFFFFFu) {
      _mm512_storeu_si512(to, bits);
    } else {
      _mm512_mask_storeu_epi16(to, exists, bits);
    }
  }
  void finish() {
    while (!is_done()) one();
  }
};
