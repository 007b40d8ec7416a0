// The skinny passes for AVX2 with FMA and F16C. Compiled on every x86-64 build by a target
// pragma, chosen at run time; other architectures get a null table.
#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "cpu/dequantize.h"
#include "cpu/fused_gemm.h"
#include "cpu/skinny.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

namespace lora_ext::cpu {
namespace {

#include "cpu/simd_dropout.h"
// clang-format off
#include "cpu/wgrad_store.h"
#include "cpu/simd_packs.h"
#include "cpu/simd_passes.h"
#include "cpu/simd_few_rows.h"
#include "cpu/simd_dequantize.h"
#include "cpu/simd_fused_gemm.h"
// clang-format on

struct Avx2 {
  using Vec = __m256;
  static constexpr int kLanes = 8;
  static constexpr int kTileRows = 6;  // 12 accumulators of 16 registers
  static constexpr int kDropoutWords = 1;

  static Vec zero() { return _mm256_setzero_ps(); }
  static Vec broadcast(float value) { return _mm256_set1_ps(value); }
  static Vec load(const float* p) { return _mm256_loadu_ps(p); }
  static Vec load(const BFloat16* p) {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
  }
  static Vec load(const Float16* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static Vec load(const int8_t* p) {
    return _mm256_cvtepi32_ps(
        _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
  }
  static Vec load(const Float8* p) {
    const __m256i bits = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
    const __m256i magnitude = _mm256_and_si256(bits, _mm256_set1_epi32(0x7F));
    const __m256i normal =
        _mm256_add_epi32(_mm256_slli_epi32(magnitude, 20), _mm256_set1_epi32(120 << 23));
    const Vec subnormal = _mm256_mul_ps(_mm256_cvtepi32_ps(magnitude), _mm256_set1_ps(0x1p-9f));
    const __m256i small = _mm256_cmpgt_epi32(_mm256_set1_epi32(8), magnitude);
    const __m256i nan = _mm256_cmpeq_epi32(magnitude, _mm256_set1_epi32(0x7F));
    const __m256i sign = _mm256_slli_epi32(_mm256_srli_epi32(bits, 7), 31);
    Vec value =
        _mm256_blendv_ps(_mm256_castsi256_ps(normal), subnormal, _mm256_castsi256_ps(small));
    value = _mm256_blendv_ps(value, _mm256_castsi256_ps(_mm256_set1_epi32(0x7FC00000)),
                             _mm256_castsi256_ps(nan));
    return _mm256_or_ps(value, _mm256_castsi256_ps(sign));
  }
  struct Table {
    Table(const float* values, bool low_first)
        : lower(_mm256_loadu_ps(values)),
          upper(_mm256_loadu_ps(values + 8)),
          shifts(_mm256_set1_epi64x(low_first ? int64_t{4} << 32 : 4)) {}
    Vec lower, upper;
    __m256i shifts;  // of the first and of the second code of a byte
  };
  // Duplicates each byte, then takes its upper and its lower half. The lowest three bits of a code
  // index either half of the table; the fourth, moved to the sign, selects the half.
  static Vec lookup(const Table& table, const uint8_t* codes) {
    int32_t four;
    __builtin_memcpy(&four, codes, sizeof(four));
    const __m256i bytes = _mm256_cvtepu8_epi64(_mm_cvtsi32_si128(four));
    const __m256i twice = _mm256_or_si256(bytes, _mm256_slli_epi64(bytes, 32));
    const __m256i code = _mm256_srlv_epi32(twice, table.shifts);
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(table.lower, code),
                            _mm256_permutevar8x32_ps(table.upper, code),
                            _mm256_castsi256_ps(_mm256_slli_epi32(code, 28)));
  }
  // Loads the first `count` elements, and zeros.
  template <class T>
  static Vec load_first(const T* p, int64_t count) {
    if (count >= kLanes) return load(p);
    float values[kLanes] = {};
    for (int64_t i = 0; i < count; ++i) values[i] = to_float(p[i]);
    return load(values);
  }
  static void store(float* p, Vec v) { _mm256_storeu_ps(p, v); }
  static void store(BFloat16* p, Vec v) {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i lsb = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_srli_epi32(
        _mm256_add_epi32(bits, _mm256_add_epi32(lsb, _mm256_set1_epi32(0x7FFF))), 16);
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const __m256i out = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7FC0), nan);
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(out, out), 0x08);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
  }
  static void store(Float16* p, Vec v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                     _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  // Transposes pairs of rows, then pairs within halves of 128 bits, then the halves.
  static void transpose(Vec (&rows)[kLanes]) {
    Vec pairs[kLanes], fours[kLanes];
    for (int i = 0; i < kLanes; i += 2) {
      pairs[i] = _mm256_unpacklo_ps(rows[i], rows[i + 1]);
      pairs[i + 1] = _mm256_unpackhi_ps(rows[i], rows[i + 1]);
    }
    for (int i = 0; i < kLanes; i += 4) {
      for (int high = 0; high < 2; ++high) {
        fours[i + 2 * high] = _mm256_shuffle_ps(pairs[i + high], pairs[i + 2 + high], 0x44);
        fours[i + 2 * high + 1] = _mm256_shuffle_ps(pairs[i + high], pairs[i + 2 + high], 0xEE);
      }
    }
    for (int i = 0; i < 4; ++i) {
      rows[i] = _mm256_permute2f128_ps(fours[i], fours[i + 4], 0x20);
      rows[i + 4] = _mm256_permute2f128_ps(fours[i], fours[i + 4], 0x31);
    }
  }
  template <class T>
  static void load_transposed(const T* in, int64_t pitch, Vec (&rows)[kLanes]) {
    for (int i = 0; i < kLanes; ++i) rows[i] = load(in + i * pitch);
    transpose(rows);
  }
  static Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
  static Vec multiply(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
  static Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
  static Vec keep(Vec v, uint32_t bits) {
    const __m256i lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const __m256i set = _mm256_and_si256(_mm256_set1_epi32(static_cast<int>(bits)), lane);
    return _mm256_and_ps(v, _mm256_castsi256_ps(_mm256_cmpeq_epi32(set, lane)));
  }

  // Four Philox calls in the 64-bit lanes; the next product needs only the low half of a word.
  static void dropout_words(const uint64_t* products, const DropoutRow& row,
                            const DropoutKeys& keys, uint32_t keep_count, uint32_t* words) {
    const __m256i mul0 = _mm256_set1_epi64x(philox::kMul0);
    const __m256i mul1 = _mm256_set1_epi64x(philox::kMul1);
    const __m256i product = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(products));
    __m256i c0 = _mm256_set1_epi64x(row.c0), c1 = _mm256_set1_epi64x(row.c1);
    __m256i c2 = _mm256_xor_si256(_mm256_srli_epi64(product, 32), _mm256_set1_epi64x(row.c2_part));
    __m256i c3 = product;
    for (int round = 2; round < philox::kRounds; ++round) {
      const __m256i p0 = _mm256_mul_epu32(c0, mul0);
      const __m256i p1 = _mm256_mul_epu32(c2, mul1);
      c0 = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(p1, 32), c1),
                            _mm256_set1_epi64x(keys.k0[round]));
      c1 = p1;
      c2 = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(p0, 32), c3),
                            _mm256_set1_epi64x(keys.k1[round]));
      c3 = p0;
    }
    const __m256i low = kept_words(c0, c1, keep_count);   // columns 0..15
    const __m256i high = kept_words(c2, c3, keep_count);  // columns 16..31
    const __m256i bytes = _mm256_permute4x64_epi64(_mm256_packs_epi16(low, high), 0xD8);
    *words = static_cast<uint32_t>(_mm256_movemask_epi8(bytes));
  }

  // 16-bit lanes: the four draws of a in order, then those of b; all ones where kept.
  static __m256i kept_words(__m256i a, __m256i b, uint32_t keep_count) {
    const __m256i mixed = _mm256_blend_epi32(a, _mm256_slli_epi64(b, 32), 0xAA);
    const __m256i order = _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7);
    const __m256i draws = _mm256_permutevar8x32_epi32(mixed, order);
    const __m256i last = _mm256_set1_epi16(static_cast<short>(keep_count - 1));
    return _mm256_cmpeq_epi16(_mm256_max_epu16(draws, last), last);
  }
};

constexpr SkinnyKernels kKernels = make_kernels<Avx2>("avx2");
constexpr FusedGemmKernels kFusedGemm = make_fused_gemm<Avx2>(&kKernels);
constexpr DequantizeKernels kDequantize = make_dequantize<Avx2>();

}  // namespace
}  // namespace lora_ext::cpu

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace lora_ext::cpu {
namespace {

// Not every compiler's __builtin_cpu_supports knows this name.
bool has_f16c() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx >> 29 & 1u) != 0;
}

bool is_supported() {
  static const bool supported =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
  return supported;
}

}  // namespace
}  // namespace lora_ext::cpu
#endif  // __x86_64__

namespace lora_ext::cpu {

#if defined(__x86_64__)
const SkinnyKernels* avx2_kernels() { return is_supported() ? &kKernels : nullptr; }
const FusedGemmKernels* avx2_fused_gemm() { return is_supported() ? &kFusedGemm : nullptr; }
const DequantizeKernels* avx2_dequantize() { return is_supported() ? &kDequantize : nullptr; }
#else
const SkinnyKernels* avx2_kernels() { return nullptr; }
const FusedGemmKernels* avx2_fused_gemm() { return nullptr; }
const DequantizeKernels* avx2_dequantize() { return nullptr; }
#endif

}  // namespace lora_ext::cpu
