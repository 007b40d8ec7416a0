// bfloat16 in pairs, as AMX tiles and vdpbf16ps multiply it: splits of floats, loads and transposes.
// Included by isa_amx.cpp and isa_avx512_bf16.cpp after their target pragma, inside their anonymous
// namespaces.
#pragma once

constexpr int64_t kTileRows = 16;   // rows of a tile, and columns of a float tile
constexpr int64_t kTileDepth = 32;  // bfloat16 elements of a tile row
constexpr int64_t kHalfBytes = sizeof(BFloat16), kFloatBytes = sizeof(float);
constexpr int64_t kTileElements = kTileRows * kTileDepth;
constexpr int64_t kRowBlock = 32;  // rows or columns of a block: two tiles
constexpr int64_t kColBlock = 64;  // columns of a block of expand and wgrad: four tiles
constexpr int64_t kStepElements = 2 * kTileElements;  // 32 rows or columns, 32 of the depth

// The first lanes of a register of 32 halves, or of 16 floats.
inline __mmask32 first_halves(int64_t count) {
  return count >= 32 ? 0xFFFFFFFFu : count <= 0 ? 0u : (1u << count) - 1;
}

inline __m256i to_half(__m512 value) {
  const __m256bh half = _mm512_cvtneps_pbh(value);
  __m256i bits;
  std::memcpy(&bits, &half, sizeof(bits));
  return bits;
}

inline __m512 to_wide(__m256i half) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

inline __m512i joined(__m256i low, __m256i high) {
  return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
}

// Splits sixteen floats into hi + lo. A finite float that would round to infinity is truncated
// instead; if hi is infinite or NaN, lo is 0, since Inf - Inf is NaN.
struct Split {
  __m256i hi, lo;

  explicit Split(__m512 value) {
    const __m512i bits = _mm512_castps_si512(value);
    const __m512i largest = _mm512_set1_epi32(0x7F7FFFFF), half = _mm512_set1_epi32(0x7F7F8000);
    const __m512i size = _mm512_and_si512(bits, _mm512_set1_epi32(0x7FFFFFFF));
    const __mmask16 overflows =
        _mm512_cmpge_epu32_mask(size, half) & _mm512_cmple_epu32_mask(size, largest);
    hi = _mm256_mask_mov_epi16(to_half(value), overflows,
                               _mm512_cvtepi32_epi16(_mm512_srli_epi32(bits, 16)));
    const __m512 rest = _mm512_sub_ps(value, to_wide(hi));
    lo = to_half(_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(rest, rest, _CMP_ORD_Q), rest));
  }
};

// Loads sixteen (at most `count`) elements of an adapter along one dimension, zero past the end.
inline __m512 load_adapter(const AdapterView& adapter, int64_t index, int64_t pitch,
                           int64_t count) {
  const auto exists = static_cast<__mmask16>(first_halves(count));
  if (adapter.dtype == Dtype::kBFloat16) {
    const auto* in = static_cast<const BFloat16*>(adapter.data) + index;
    if (pitch == 1) return to_wide(_mm256_maskz_loadu_epi16(exists, in));
    alignas(64) float values[16] = {};
    for (int64_t i = 0; i < std::min<int64_t>(count, 16); ++i) values[i] = to_float(in[i * pitch]);
    return _mm512_load_ps(values);
  }
  const auto* in = static_cast<const float*>(adapter.data) + index;
  if (pitch == 1) return _mm512_maskz_loadu_ps(exists, in);
  alignas(64) float values[16] = {};
  for (int64_t i = 0; i < std::min<int64_t>(count, 16); ++i) values[i] = in[i * pitch];
  return _mm512_load_ps(values);
}

// out[j] = the pairs j of 16 rows of 32 halves: one B tile of columns that are contiguous.
inline void transpose_pairs(__m512i (&r)[16], BFloat16* out) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]), t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    const __m512i a = _mm512_shuffle_i32x4(r[i], r[4 + i], 0x88);
    const __m512i b = _mm512_shuffle_i32x4(r[i], r[4 + i], 0xDD);
    const __m512i c = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0x88);
    const __m512i d = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0xDD);
    _mm512_store_si512(out + i * kTileDepth, _mm512_shuffle_i32x4(a, c, 0x88));
    _mm512_store_si512(out + (4 + i) * kTileDepth, _mm512_shuffle_i32x4(b, d, 0x88));
    _mm512_store_si512(out + (8 + i) * kTileDepth, _mm512_shuffle_i32x4(a, c, 0xDD));
    _mm512_store_si512(out + (12 + i) * kTileDepth, _mm512_shuffle_i32x4(b, d, 0xDD));
  }
}

// Interleaves two rows of sixteen as pairs (a[i], b[i]): one row of a B tile.
inline __m512i interleave(__m256i a, __m256i b) {
  return _mm512_or_si512(_mm512_cvtepu16_epi32(a), _mm512_slli_epi32(_mm512_cvtepu16_epi32(b), 16));
}
