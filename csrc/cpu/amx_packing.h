// P's rows in tiles, for the layer in one pass on AMX tiles.
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
