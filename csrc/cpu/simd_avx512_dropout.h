// Eight Philox calls in the 64-bit lanes of one register: 64 columns of dropout bits.
// Shared by the AVX-512 and AMX files; included after their target pragma and simd_dropout.h.
#pragma once

// 16-bit lanes: per 32 columns the four draws of a in order, then those of b; returns one bit per
// lane, set if kept.
inline uint32_t avx512_kept(__m512i a, __m512i b, __m512i last) {
  const __m512i order =
      _mm512_setr_epi32(0, 2, 4, 6, 16, 18, 20, 22, 8, 10, 12, 14, 24, 26, 28, 30);
  return _mm512_cmple_epu16_mask(_mm512_permutex2var_epi32(a, order, b), last);
}

inline void avx512_dropout_words(const uint64_t* products, const DropoutRow& row,
                                 const DropoutKeys& keys, uint32_t keep_count, uint32_t* words) {
  constexpr int kXor3 = 0x96;
  // High halves, in low ones; the high ones are never read. A shift would wait for a multiplication.
  const auto high_of = [](__m512i p) { return _mm512_shuffle_epi32(p, _MM_PERM_DDBB); };
  const __m512i mul0 = _mm512_set1_epi64(philox::kMul0);
  const __m512i mul1 = _mm512_set1_epi64(philox::kMul1);
  const __m512i product = _mm512_loadu_si512(products);
  __m512i c0 = _mm512_set1_epi64(row.c0), c1 = _mm512_set1_epi64(row.c1);
  __m512i c2 = _mm512_xor_si512(high_of(product), _mm512_set1_epi64(row.c2_part));
  __m512i c3 = product;
  for (int round = 2; round < philox::kRounds; ++round) {
    const __m512i p0 = _mm512_mul_epu32(c0, mul0);
    const __m512i p1 = _mm512_mul_epu32(c2, mul1);
    c0 = _mm512_ternarylogic_epi64(high_of(p1), c1, _mm512_set1_epi64(keys.k0[round]), kXor3);
    c1 = p1;
    c2 = _mm512_ternarylogic_epi64(high_of(p0), c3, _mm512_set1_epi64(keys.k1[round]), kXor3);
    c3 = p0;
  }
  const __m512i last = _mm512_set1_epi16(static_cast<short>(keep_count - 1));
  const uint32_t low = avx512_kept(c0, c1, last);   // columns 0..15 and 32..47
  const uint32_t high = avx512_kept(c2, c3, last);  // columns 16..31 and 48..63
  words[0] = (low & 0xFFFFu) | high << 16;
  words[1] = low >> 16 | (high & 0xFFFF0000u);
}
