// The skinny passes for AVX-512 (F, BW, DQ, VL). Compiled on every x86-64 build by a target
// pragma, chosen at run time; other architectures get a null table.
#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "cpu/dequantize.h"
#include "cpu/fused_gemm.h"
#include "cpu/skinny.h"

#if defined(__x86_64__)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma,prefer-vector-width=512")
#endif

namespace lora_ext::cpu {
namespace {

#include "cpu/simd_dropout.h"
// clang-format off
#include "cpu/simd_avx512_dropout.h"
#include "cpu/wgrad_store.h"
#include "cpu/simd_packs.h"
#include "cpu/simd_passes.h"
#include "cpu/simd_few_rows.h"
#include "cpu/simd_dequantize.h"
#include "cpu/simd_fused_gemm.h"
// clang-format on

struct Avx512 {
  using Vec = __m512;
  static constexpr int kLanes = 16;
  static constexpr int kTileRows = 12;  // 24 accumulators of 32 registers
  static constexpr int kDropoutWords = 2;

  static Vec zero() { return _mm512_setzero_ps(); }
  static Vec broadcast(float value) { return _mm512_set1_ps(value); }
  static Vec load(const float* p) { return _mm512_loadu_ps(p); }
  static Vec load(const BFloat16* p) {
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
  }
  static Vec load(const Float16* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  // Loads the first `count` elements, and zeros.
  static Vec load_first(const float* p, int64_t count) {
    return _mm512_maskz_loadu_ps(mask_of(count), p);
  }
  static Vec load_first(const BFloat16* p, int64_t count) {
    const __m256i half = _mm256_maskz_loadu_epi16(mask_of(count), p);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
  }
  static Vec load_first(const Float16* p, int64_t count) {
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask_of(count), p));
  }
  static Vec load(const int8_t* p) {
    return _mm512_cvtepi32_ps(
        _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
  }
  static Vec load(const Float8* p) {
    const __m512i bits = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    const __m512i magnitude = _mm512_and_si512(bits, _mm512_set1_epi32(0x7F));
    const __m512i normal =
        _mm512_add_epi32(_mm512_slli_epi32(magnitude, 20), _mm512_set1_epi32(120 << 23));
    const __m512i subnormal =
        _mm512_castps_si512(_mm512_mul_ps(_mm512_cvtepi32_ps(magnitude), _mm512_set1_ps(0x1p-9f)));
    const __mmask16 small = _mm512_cmplt_epi32_mask(magnitude, _mm512_set1_epi32(8));
    const __mmask16 nan = _mm512_cmpeq_epi32_mask(magnitude, _mm512_set1_epi32(0x7F));
    __m512i value = _mm512_mask_mov_epi32(normal, small, subnormal);
    value = _mm512_mask_mov_epi32(value, nan, _mm512_set1_epi32(0x7FC00000));
    const __m512i sign = _mm512_slli_epi32(_mm512_srli_epi32(bits, 7), 31);
    return _mm512_castsi512_ps(_mm512_or_si512(value, sign));
  }
  struct Table {
    Table(const float* values, bool low_first)
        : all(_mm512_loadu_ps(values)),
          shifts(_mm512_set1_epi64(low_first ? int64_t{4} << 32 : 4)) {}
    Vec all;
    __m512i shifts;  // of the first and of the second code of a byte
  };
  // Doubles each byte, then takes its upper and its lower half; the lowest four bits index.
  static Vec lookup(const Table& table, const uint8_t* codes) {
    const __m512i bytes =
        _mm512_cvtepu8_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes)));
    const __m512i twice = _mm512_or_si512(bytes, _mm512_slli_epi64(bytes, 32));
    return _mm512_permutexvar_ps(_mm512_srlv_epi32(twice, table.shifts), table.all);
  }
  static __mmask16 mask_of(int64_t count) {
    return static_cast<__mmask16>(count >= kLanes ? 0xFFFFu : (1u << count) - 1);
  }
  static void store(float* p, Vec v) { _mm512_storeu_ps(p, v); }
  static void store(BFloat16* p, Vec v) {
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i lsb = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_srli_epi32(
        _mm512_add_epi32(bits, _mm512_add_epi32(lsb, _mm512_set1_epi32(0x7FFF))), 16);
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    const __m512i out = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7FC0));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(out));
  }
  static void store(Float16* p, Vec v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  // rows[j] = float(in[i][j]) for 16 x 16 bfloat16 elements, at i. Two neighbours move as one word,
  // which takes 32 shuffles instead of 64, and no conversion before them.
  [[gnu::always_inline]] static void load_transposed(const BFloat16* in, int64_t pitch,
                                                     Vec (&rows)[kLanes]) {
    __m512i words[8], pairs[8], fours[8];
    const auto row = [&](int64_t i) {
      return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(in + i * pitch));
    };
    for (int i = 0; i < 8; ++i) {
      const int first = i < 4 ? i : i + 4;  // 0..3 beside 4..7, 8..11 beside 12..15
      words[i] = _mm512_inserti64x4(_mm512_castsi256_si512(row(first)), row(first + 4), 1);
    }
    for (int i = 0; i < 8; i += 2) {
      pairs[i] = _mm512_unpacklo_epi32(words[i], words[i + 1]);
      pairs[i + 1] = _mm512_unpackhi_epi32(words[i], words[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
      for (int high = 0; high < 2; ++high) {
        fours[i + 2 * high] = _mm512_unpacklo_epi64(pairs[i + high], pairs[i + 2 + high]);
        fours[i + 2 * high + 1] = _mm512_unpackhi_epi64(pairs[i + high], pairs[i + 2 + high]);
      }
    }
    const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xFFFF0000u));
    for (int word = 0; word < 8; ++word) {  // columns 2 word and 2 word + 1
      const __m512i a = fours[word % 4], b = fours[4 + word % 4];
      const __m512i both =
          word < 4 ? _mm512_shuffle_i32x4(a, b, 0x88) : _mm512_shuffle_i32x4(a, b, 0xDD);
      rows[2 * word] = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
      rows[2 * word + 1] = _mm512_castsi512_ps(_mm512_and_si512(both, upper));
    }
  }
  template <class T>
  static void load_transposed(const T* in, int64_t pitch, Vec (&rows)[kLanes]) {
    for (int i = 0; i < kLanes; ++i) rows[i] = load(in + i * pitch);
    transpose(rows);
  }
  // Transposes pairs of rows, then pairs within quarters of 128 bits, then the quarters.
  static void transpose(Vec (&rows)[kLanes]) {
    Vec pairs[kLanes], fours[kLanes];
    for (int i = 0; i < kLanes; i += 2) {
      pairs[i] = _mm512_unpacklo_ps(rows[i], rows[i + 1]);
      pairs[i + 1] = _mm512_unpackhi_ps(rows[i], rows[i + 1]);
    }
    for (int i = 0; i < kLanes; i += 4) {
      for (int high = 0; high < 2; ++high) {
        fours[i + 2 * high] = _mm512_shuffle_ps(pairs[i + high], pairs[i + 2 + high], 0x44);
        fours[i + 2 * high + 1] = _mm512_shuffle_ps(pairs[i + high], pairs[i + 2 + high], 0xEE);
      }
    }
    // fours[4 b + c]: column c of each quarter, rows 4 b .. 4 b + 3.
    for (int c = 0; c < 4; ++c) {
      const Vec low = _mm512_shuffle_f32x4(fours[c], fours[4 + c], 0x88);   // quarters 0, 2
      const Vec high = _mm512_shuffle_f32x4(fours[c], fours[4 + c], 0xDD);  // quarters 1, 3
      const Vec low2 = _mm512_shuffle_f32x4(fours[8 + c], fours[12 + c], 0x88);
      const Vec high2 = _mm512_shuffle_f32x4(fours[8 + c], fours[12 + c], 0xDD);
      rows[c] = _mm512_shuffle_f32x4(low, low2, 0x88);
      rows[4 + c] = _mm512_shuffle_f32x4(high, high2, 0x88);
      rows[8 + c] = _mm512_shuffle_f32x4(low, low2, 0xDD);
      rows[12 + c] = _mm512_shuffle_f32x4(high, high2, 0xDD);
    }
  }
  static Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
  static Vec multiply(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
  static Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
  static Vec keep(Vec v, uint32_t bits) {
    return _mm512_maskz_mov_ps(static_cast<__mmask16>(bits), v);
  }

  static void dropout_words(const uint64_t* products, const DropoutRow& row,
                            const DropoutKeys& keys, uint32_t keep_count, uint32_t* words) {
    avx512_dropout_words(products, row, keys, keep_count, words);
  }
};

constexpr SkinnyKernels kKernels = make_kernels<Avx512>("avx512");
constexpr FusedGemmKernels kFusedGemm = make_fused_gemm<Avx512>(&kKernels);
constexpr DequantizeKernels kDequantize = make_dequantize<Avx512>();

}  // namespace
}  // namespace lora_ext::cpu

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif  // __x86_64__

namespace lora_ext::cpu {

#if defined(__x86_64__)
namespace {

bool is_supported() {
  static const bool supported =
      __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return supported;
}

}  // namespace

const SkinnyKernels* avx512_kernels() { return is_supported() ? &kKernels : nullptr; }
const FusedGemmKernels* avx512_fused_gemm() { return is_supported() ? &kFusedGemm : nullptr; }
const DequantizeKernels* avx512_dequantize() { return is_supported() ? &kDequantize : nullptr; }
#else
const SkinnyKernels* avx512_kernels() { return nullptr; }
const FusedGemmKernels* avx512_fused_gemm() { return nullptr; }
const DequantizeKernels* avx512_dequantize() { return nullptr; }
#endif

}  // namespace lora_ext::cpu
