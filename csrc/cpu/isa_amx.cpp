// The skinny passes on AMX tiles, for bfloat16 activations.
//
// Every product runs as bfloat16 tiles with float sums. What is not bfloat16 already is written as
// a sum of two bfloat16 terms, hi = bf16(v) and lo = bf16(v - hi), exact to 2^-17: T always, the
// adapters when they are float. Terms extend the inner dimension, so a product of split operands
// is still one tile product over [hi hi lo] x [hi lo hi]; lo x lo, 2^-34, is left out:
//
//              A (rows x inner)             B (inner x 16 columns, pairs interleaved)
//     shrink   P, as it lies in memory      Q_hi and Q_lo, accumulated onto the same tile
//     expand   [T_hi T_lo (T_hi)]           [U_hi U_hi (U_lo)]^T, packed once a call
//     wgrad    T_hi^T and T_lo^T            P, two rows interleaved while it is staged
//
// A tile is 16 rows of 64 bytes; TDPBF16PS multiplies 16 x 32 by 32 x 16 in 16 cycles. Compiled on
// x86-64 by a target pragma; chosen at run time when processor and kernel grant the tile state.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "skinny.h"

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#if defined(__clang__)
#pragma clang attribute push(                                                                   \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,amx-tile,amx-bf16"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,amx-tile,amx-bf16")
#endif

namespace lora_ext::cpu {
namespace {

#include "simd_avx512_dropout.h"
#include "simd_dropout.h"

struct AmxDropout {
  static constexpr int kDropoutWords = 2;
  static void dropout_words(const uint64_t* products, const DropoutRow& row,
                            const DropoutKeys& keys, uint32_t keep_count, uint32_t* words) {
    avx512_dropout_words(products, row.c0, row.c1, row.c2_part, keys.k0, keys.k1, keep_count,
                         words);
  }
};

constexpr int64_t kTileRows = 16;   // rows of a tile, and columns of a float tile
constexpr int64_t kTileDepth = 32;  // bfloat16 elements of a tile row
constexpr int64_t kTileElements = kTileRows * kTileDepth;
constexpr int64_t kRowBlock = 32;      // rows of a block of shrink and expand: two tiles
constexpr int64_t kShrinkDepth = 512;  // staged columns of shrink: 32 KB
constexpr int64_t kColBlock = 64;      // columns of a block of expand and wgrad: four tiles
constexpr int64_t kWgradRows = 128;    // staged rows of wgrad: 16 KB

// Tiles 0-3 hold sums, 4-5 the A side, 6-7 the B side; all are 16 rows of 64 bytes.
struct TileConfig {
  alignas(64) uint8_t bytes[64] = {};

  TileConfig() {
    bytes[0] = 1;  // palette
    for (int tile = 0; tile < 8; ++tile) {
      bytes[16 + 2 * tile] = 64;
      bytes[48 + tile] = kTileRows;
    }
    _tile_loadconfig(bytes);
  }
  ~TileConfig() { _tile_release(); }
};

inline int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
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

// Sixteen floats as hi + lo; an infinite or NaN hi stands alone, since Inf - Inf is NaN.
struct Split {
  __m256i hi, lo;

  explicit Split(__m512 value) : hi(to_half(value)) {
    const __m512 rest = _mm512_sub_ps(value, to_wide(hi));
    lo = to_half(_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(rest, rest, _CMP_ORD_Q), rest));
  }
};

// Sixteen (at most `count`) elements of an adapter along one dimension, zero beyond.
inline __m512 load_adapter(const AdapterView& adapter, int64_t index, int64_t pitch,
                           int64_t count) {
  const auto exists = static_cast<__mmask16>(count >= 16 ? 0xFFFFu : (1u << count) - 1);
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

// Two rows of sixteen as pairs (a[i], b[i]): one row of a B tile.
inline __m512i interleave(__m256i a, __m256i b) {
  return _mm512_or_si512(_mm512_cvtepu16_epi32(a), _mm512_slli_epi32(_mm512_cvtepu16_epi32(b), 16));
}

// ---- shrink: T = P Q ----

// Panel: for each 32 columns, each 16 ranks, each term, one B tile: [16 column pairs][16 ranks][2].
int64_t shrink_panel_bytes(int64_t rank, int64_t cols) {
  return round_up(cols, kTileDepth) * round_up(rank, kTileRows) * 2 * 2;
}

void pack_shrink(const AdapterView& adapter, void* panel) {
  const bool is_half = adapter.dtype == Dtype::kBFloat16;
  const int64_t terms = is_half ? 1 : 2;
  auto* out = static_cast<BFloat16*>(panel);
  for (int64_t c = 0; c < adapter.cols; c += kTileDepth) {
    for (int64_t j = 0; j < adapter.rank; j += kTileRows, out += terms * kTileElements) {
      const int64_t ranks = std::min(kTileRows, adapter.rank - j);
      for (int64_t k = 0; k < kTileDepth; k += 2) {
        const auto column = [&](int64_t col) {
          const int64_t index = j * adapter.rank_pitch + col * adapter.col_pitch;
          return Split(col < adapter.cols ? load_adapter(adapter, index, adapter.rank_pitch, ranks)
                                          : _mm512_setzero_ps());
        };
        const Split even = column(c + k), odd = column(c + k + 1);
        _mm512_store_si512(out + k * kTileRows, interleave(even.hi, odd.hi));
        if (!is_half) {
          _mm512_store_si512(out + kTileElements + k * kTileRows, interleave(even.lo, odd.lo));
        }
      }
    }
  }
}

// Rows [0, rows) and columns [0, cols) of src, masked, zero-padded to 32 columns and 32 rows.
void stage_rows(const BFloat16* src, int64_t src_pitch, int64_t rows, int64_t cols,
                const uint32_t* bits, int64_t bits_pitch, BFloat16* dst) {
  for (int64_t m = 0; m < kRowBlock; ++m) {
    BFloat16* out = dst + m * kShrinkDepth;
    for (int64_t c = 0; c < cols; c += kTileDepth) {
      uint32_t keep = m < rows ? 0xFFFFFFFFu : 0u;
      if (cols - c < kTileDepth) keep &= (1u << (cols - c)) - 1;
      if (bits != nullptr && m < rows) keep &= bits[m * bits_pitch + c / 32];
      // Lanes that are masked off are not read: no address beyond the row is touched.
      const __m512i value = _mm512_maskz_loadu_epi16(keep, src + m * src_pitch + c);
      _mm512_storeu_si512(out + c, value);
    }
  }
}

// Adds two row tiles by up to two rank tiles of one staged block to sums [32, rank_pad].
template <int kRankTiles>
void shrink_tiles(const BFloat16* a, int64_t a_pitch, int64_t depth, const BFloat16* b,
                  int64_t b_step, int64_t terms, float* sums, int64_t sums_pitch) {
  const auto stride = static_cast<int>(sums_pitch * 4);
  const auto a_stride = static_cast<int>(a_pitch * 2);
  _tile_loadd(0, sums, stride);
  _tile_loadd(1, sums + kTileRows * sums_pitch, stride);
  if constexpr (kRankTiles == 2) {
    _tile_loadd(2, sums + kTileRows, stride);
    _tile_loadd(3, sums + kTileRows * sums_pitch + kTileRows, stride);
  }
  for (int64_t k = 0; k < depth; k += kTileDepth, b += b_step) {
    _tile_loadd(4, a + k, a_stride);
    _tile_loadd(5, a + kTileRows * a_pitch + k, a_stride);
    for (int64_t term = 0; term < terms; ++term) {
      _tile_loadd(6, b + term * kTileElements, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 5, 6);
      if constexpr (kRankTiles == 2) {
        _tile_loadd(7, b + (terms + term) * kTileElements, 64);
        _tile_dpbf16ps(2, 4, 7);
        _tile_dpbf16ps(3, 5, 7);
      }
    }
  }
  _tile_stored(0, sums, stride);
  _tile_stored(1, sums + kTileRows * sums_pitch, stride);
  if constexpr (kRankTiles == 2) {
    _tile_stored(2, sums + kTileRows, stride);
    _tile_stored(3, sums + kTileRows * sums_pitch + kTileRows, stride);
  }
}

void shrink(const ShrinkArgs& args, Range rows) {
  const TileConfig config;
  const int64_t rank_pad = round_up(args.rank, kTileRows);
  const int64_t terms = args.q_is_half ? 1 : 2;
  const int64_t b_step = rank_pad / kTileRows * terms * kTileElements;  // one step of 32 columns
  const auto* q = static_cast<const BFloat16*>(args.q);
  const bool drop = args.dropout.enabled();
  alignas(64) BFloat16 staged[kRowBlock * kShrinkDepth];
  alignas(64) float sums[kRowBlock * kMaxRank];
  uint32_t bits[kRowBlock * kShrinkDepth / 32];
  for (int64_t m = rows.begin; m < rows.end; m += kRowBlock) {
    const int64_t block_rows = std::min(kRowBlock, rows.end - m);
    std::memset(sums, 0, static_cast<size_t>(kRowBlock * rank_pad) * sizeof(float));
    for (int64_t c = 0; c < args.cols; c += kShrinkDepth) {
      const int64_t depth = std::min(kShrinkDepth, args.cols - c);
      const BFloat16* a = static_cast<const BFloat16*>(args.p) + m * args.p_pitch + c;
      int64_t a_pitch = args.p_pitch;
      if (drop) {
        dropout_bits<AmxDropout>(args.dropout, {m, m + block_rows}, {c, c + depth}, bits,
                                 kShrinkDepth / 32);
      }
      if (drop || block_rows < kRowBlock || depth % kTileDepth != 0) {
        stage_rows(a, a_pitch, block_rows, depth, drop ? bits : nullptr, kShrinkDepth / 32, staged);
        a = staged;
        a_pitch = kShrinkDepth;
      }
      const BFloat16* b = q + c / kTileDepth * b_step;
      int64_t j = 0;
      for (; j + 2 * kTileRows <= rank_pad; j += 2 * kTileRows) {
        shrink_tiles<2>(a, a_pitch, depth, b + j / kTileRows * terms * kTileElements, b_step, terms,
                        sums + j, rank_pad);
      }
      if (j < rank_pad) {
        shrink_tiles<1>(a, a_pitch, depth, b + j / kTileRows * terms * kTileElements, b_step, terms,
                        sums + j, rank_pad);
      }
    }
    for (int64_t i = 0; i < block_rows; ++i) {
      float* t = args.t + (m + i) * args.rank;
      for (int64_t j = 0; j < args.rank; ++j) t[j] = args.scale * sums[i * rank_pad + j];
    }
  }
}

// ---- expand: Y += scale * mask * (T U) ----

int64_t expand_terms(bool u_is_half) { return u_is_half ? 2 : 3; }

int64_t expand_depth(int64_t rank, bool u_is_half) {
  return round_up(rank * expand_terms(u_is_half), kTileDepth);
}

// Panel: for each 16 columns, each 32 inner elements, one B tile: [16 inner pairs][16 columns][2].
int64_t expand_panel_bytes(int64_t rank, int64_t cols) {
  return round_up(cols, kColBlock) * expand_depth(rank, false) * 2;
}

void pack_expand(const AdapterView& adapter, void* panel) {
  const bool is_half = adapter.dtype == Dtype::kBFloat16;
  const int64_t inner = adapter.rank * expand_terms(is_half);
  const int64_t depth = expand_depth(adapter.rank, is_half);
  auto* out = static_cast<BFloat16*>(panel);
  for (int64_t c = 0; c < round_up(adapter.cols, kColBlock); c += kTileRows) {
    const int64_t cols = std::clamp<int64_t>(adapter.cols - c, 0, kTileRows);
    // Inner element k is rank index k % rank of term k / rank: hi, hi, lo.
    const auto inner_row = [&](int64_t k) {
      if (k >= inner || cols == 0) return _mm256_setzero_si256();
      const int64_t index = k % adapter.rank * adapter.rank_pitch + c * adapter.col_pitch;
      const Split value(load_adapter(adapter, index, adapter.col_pitch, cols));
      return k / adapter.rank == 2 ? value.lo : value.hi;
    };
    for (int64_t k = 0; k < depth; k += 2, out += kTileDepth) {
      _mm512_store_si512(out, interleave(inner_row(k), inner_row(k + 1)));
    }
  }
}

int64_t expand_t_bytes(int64_t rows, int64_t rank, bool u_is_half) {
  return round_up(rows, kRowBlock) * expand_depth(rank, u_is_half) * 2;
}

// packed[m] = [T_hi T_lo (T_hi)], zero beyond the rows in the last block of 32: [rows_pad, depth].
void pack_expand_t(const float* t, int64_t rank, bool u_is_half, Range rows, void* packed) {
  const int64_t depth = expand_depth(rank, u_is_half);
  auto* out = static_cast<BFloat16*>(packed) + rows.begin * depth;
  const int64_t rows_pad = round_up(rows.end - rows.begin, kRowBlock);
  std::memset(out, 0, static_cast<size_t>(rows_pad * depth) * sizeof(BFloat16));
  for (int64_t m = rows.begin; m < rows.end; ++m, out += depth) {
    for (int64_t j = 0; j < rank; j += 16) {
      const auto exists = static_cast<__mmask16>(rank - j >= 16 ? 0xFFFFu : (1u << (rank - j)) - 1);
      const Split value(_mm512_maskz_loadu_ps(exists, t + m * rank + j));
      _mm256_mask_storeu_epi16(out + j, exists, value.hi);
      _mm256_mask_storeu_epi16(out + rank + j, exists, value.lo);
      if (!u_is_half) _mm256_mask_storeu_epi16(out + 2 * rank + j, exists, value.hi);
    }
  }
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

// At most 32 rows by 64 columns at (row, col).
void expand_block(const ExpandArgs& args, int64_t row, int64_t rows, int64_t col,
                  const uint32_t* bits, int64_t bits_pitch) {
  alignas(64) float sums[kRowBlock * kColBlock];
  const int64_t depth = expand_depth(args.rank, args.u_is_half);
  const auto* t = static_cast<const BFloat16*>(args.t) + row * depth;
  const auto* u = static_cast<const BFloat16*>(args.u) + col * depth;
  constexpr int kSumStride = kColBlock * 4;
  for (int64_t pair = 0; pair < kColBlock; pair += 2 * kTileRows) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t k = 0; k < depth; k += kTileDepth) {
      _tile_loadd(4, t + k, static_cast<int>(depth * 2));
      _tile_loadd(5, t + kTileRows * depth + k, static_cast<int>(depth * 2));
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
    BFloat16* y = static_cast<BFloat16*>(args.y) + (row + m) * args.y_pitch + col;
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
        dropout_bits<AmxDropout>(args.dropout, {m, m + block_rows},
                                 {c, std::min(c + kMaskCols, args.cols)}, bits, kMaskCols / 32);
      }
      expand_block(args, m, block_rows, c, drop ? bits + c % kMaskCols / 32 : nullptr,
                   kMaskCols / 32);
    }
  }
}

// ---- wgrad: G = T^T P ----

// P of 64 columns and an even number of rows, masked, two rows interleaved:
// dst[pair][column][2]; rows beyond `rows` and columns beyond `cols` are zero.
void stage_pairs(const BFloat16* src, int64_t src_pitch, int64_t rows, int64_t rows_pad,
                 int64_t cols, const uint32_t* bits, int64_t bits_pitch, BFloat16* dst) {
  const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8,
                                       39, 7, 38, 6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
  const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  for (int64_t m = 0; m < rows_pad; m += 2) {
    BFloat16* out = dst + m * kColBlock;
    for (int64_t c = 0; c < kColBlock; c += kTileDepth) {
      const int64_t exist = std::clamp<int64_t>(cols - c, 0, kTileDepth);
      const uint32_t inside = exist == kTileDepth ? 0xFFFFFFFFu : (1u << exist) - 1;
      uint32_t keep0 = m < rows ? inside : 0u;
      uint32_t keep1 = m + 1 < rows ? inside : 0u;
      if (bits != nullptr && m < rows) keep0 &= bits[m * bits_pitch + c / 32];
      if (bits != nullptr && m + 1 < rows) keep1 &= bits[(m + 1) * bits_pitch + c / 32];
      const BFloat16* in = src + m * src_pitch + c;
      const __m512i row0 = _mm512_maskz_loadu_epi16(keep0, in);
      const __m512i row1 = _mm512_maskz_loadu_epi16(keep1, in + src_pitch);
      _mm512_storeu_si512(out + c * 2, _mm512_permutex2var_epi16(row0, low, row1));
      _mm512_storeu_si512(out + c * 2 + 32, _mm512_permutex2var_epi16(row0, high, row1));
    }
  }
}

int64_t wgrad_t_bytes(int64_t rows, int64_t rank, bool /*u_is_half*/) {
  return round_up(rows, kWgradRows) * round_up(rank, kTileRows) * 2 * 2;
}

// For each block of rows T_hi^T and T_lo^T, zero-padded: [block][term][rank_pad][kWgradRows].
void pack_wgrad_t(const float* t, int64_t rank, bool /*u_is_half*/, Range rows, void* packed) {
  const int64_t rank_pad = round_up(rank, kTileRows);
  for (int64_t m0 = rows.begin; m0 < rows.end; m0 += kWgradRows) {
    auto* hi = static_cast<BFloat16*>(packed) + m0 * rank_pad * 2;
    BFloat16* lo = hi + rank_pad * kWgradRows;
    std::memset(hi, 0, static_cast<size_t>(2 * rank_pad * kWgradRows) * sizeof(BFloat16));
    for (int64_t m = m0; m < std::min(m0 + kWgradRows, rows.end); ++m) {
      for (int64_t j = 0; j < rank; j += 16) {
        const int64_t count = std::min<int64_t>(16, rank - j);
        const auto exists = static_cast<__mmask16>((1u << count) - 1);
        const Split value(_mm512_maskz_loadu_ps(exists, t + m * rank + j));
        alignas(32) BFloat16 values[2][16];
        _mm256_store_si256(reinterpret_cast<__m256i*>(values[0]), value.hi);
        _mm256_store_si256(reinterpret_cast<__m256i*>(values[1]), value.lo);
        for (int64_t i = 0; i < count; ++i) {
          hi[(j + i) * kWgradRows + m - m0] = values[0][i];
          lo[(j + i) * kWgradRows + m - m0] = values[1][i];
        }
      }
    }
  }
}

// sums [16 ranks, 64 columns] += T^T P for one rank tile of a staged block.
void wgrad_tiles(const BFloat16* t_hi, const BFloat16* t_lo, const BFloat16* p, int64_t rows,
                 float* sums) {
  constexpr int kSumStride = kColBlock * 4;
  constexpr int kPairStride = kColBlock * 4;
  _tile_loadd(0, sums, kSumStride);
  _tile_loadd(1, sums + kTileRows, kSumStride);
  _tile_loadd(2, sums + 2 * kTileRows, kSumStride);
  _tile_loadd(3, sums + 3 * kTileRows, kSumStride);
  for (int64_t m = 0; m < rows; m += kTileDepth) {
    const BFloat16* b = p + m * kColBlock;
    _tile_loadd(4, t_hi + m, kWgradRows * 2);
    _tile_loadd(5, t_lo + m, kWgradRows * 2);
    _tile_loadd(6, b, kPairStride);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(0, 5, 6);
    _tile_loadd(7, b + 2 * kTileRows, kPairStride);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(1, 5, 7);
    _tile_loadd(6, b + 4 * kTileRows, kPairStride);
    _tile_dpbf16ps(2, 4, 6);
    _tile_dpbf16ps(2, 5, 6);
    _tile_loadd(7, b + 6 * kTileRows, kPairStride);
    _tile_dpbf16ps(3, 4, 7);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, sums, kSumStride);
  _tile_stored(1, sums + kTileRows, kSumStride);
  _tile_stored(2, sums + 2 * kTileRows, kSumStride);
  _tile_stored(3, sums + 3 * kTileRows, kSumStride);
}

// One 64-column block of sums, along the contiguous dimension of g: dlora_b is [N, rank].
template <class T>
void store_block(const WgradArgs& args, int64_t col, int64_t cols, const float* sums) {
  T* out = static_cast<T*>(args.g) + col * args.g_col_pitch;
  if (args.g_rank_pitch == 1) {
    for (int64_t i = 0; i < cols; ++i) {
      for (int64_t j = 0; j < args.rank; ++j) {
        from_float(args.scale * sums[j * kColBlock + i], &out[i * args.g_col_pitch + j]);
      }
    }
    return;
  }
  for (int64_t j = 0; j < args.rank; ++j) {
    for (int64_t i = 0; i < cols; ++i) {
      from_float(args.scale * sums[j * kColBlock + i],
                 &out[j * args.g_rank_pitch + i * args.g_col_pitch]);
    }
  }
}

void store_wgrad(const WgradArgs& args, Range cols, const float* sums) {
  const int64_t block_sums = round_up(args.rank, kTileRows) * kColBlock;
  for (int64_t c = cols.begin; c < cols.end; c += kColBlock, sums += block_sums) {
    const int64_t count = std::min(kColBlock, cols.end - c);
    if (args.g_dtype == Dtype::kBFloat16) {
      store_block<BFloat16>(args, c, count, sums);
    } else {
      store_block<float>(args, c, count, sums);
    }
  }
}

// Columns go in slabs whose sums fit 128 KB; a block of rows draws the mask of a whole slab.
void wgrad(const WgradArgs& args, const ExpandArgs& expand, Range cols) {
  const TileConfig config;
  constexpr int64_t kMaxSlab = 512;
  constexpr int64_t kBitsPitch = kMaxSlab / 32;
  constexpr int64_t kSums = kMaxRank * kColBlock;
  const int64_t rank_pad = round_up(args.rank, kTileRows);
  const int64_t slab = std::min(kMaxSlab, kSums / rank_pad / kColBlock * kColBlock);
  const bool drop = args.dropout.enabled();
  alignas(64) BFloat16 staged[kWgradRows * kColBlock];
  alignas(64) float sums[kSums];
  uint32_t bits[kWgradRows * kBitsPitch];
  for (int64_t c0 = cols.begin; c0 < cols.end; c0 += slab) {
    const int64_t c1 = std::min(c0 + slab, cols.end);
    std::memset(sums, 0, static_cast<size_t>(rank_pad * round_up(c1 - c0, kColBlock)) * 4);
    for (int64_t m = 0; m < args.rows; m += kWgradRows) {
      const int64_t block_rows = std::min(kWgradRows, args.rows - m);
      const int64_t rows_pad = round_up(block_rows, kTileDepth);
      const auto* t = static_cast<const BFloat16*>(args.t) + m * rank_pad * 2;
      if (drop) {
        dropout_bits<AmxDropout>(args.dropout, {m, m + block_rows}, {c0, c1}, bits, kBitsPitch);
      }
      for (int64_t c = c0; c < c1; c += kColBlock) {
        const int64_t block_cols = std::min(kColBlock, c1 - c);
        const uint32_t* keep = drop ? bits + (c - c0) / 32 : nullptr;
        const auto* p = static_cast<const BFloat16*>(args.p) + m * args.p_pitch + c;
        stage_pairs(p, args.p_pitch, block_rows, rows_pad, block_cols, keep, kBitsPitch, staged);
        float* block_sums = sums + (c - c0) * rank_pad;
        for (int64_t j = 0; j < rank_pad; j += kTileRows) {
          wgrad_tiles(t + j * kWgradRows, t + (rank_pad + j) * kWgradRows, staged, rows_pad,
                      block_sums + j * kColBlock);
        }
        if (expand.y == nullptr) continue;
        for (int64_t i = 0; i < block_rows; i += kRowBlock) {
          expand_block(expand, m + i, std::min(kRowBlock, block_rows - i), c,
                       drop ? keep + i * kBitsPitch : nullptr, kBitsPitch);
        }
      }
    }
    store_wgrad(args, {c0, c1}, sums);
  }
}

constexpr SkinnyKernels kKernels = {"amx",
                                    kRowBlock,
                                    kColBlock,
                                    shrink_panel_bytes,
                                    pack_shrink,
                                    expand_panel_bytes,
                                    pack_expand,
                                    {kRowBlock, expand_t_bytes, pack_expand_t},
                                    {kWgradRows, wgrad_t_bytes, pack_wgrad_t},
                                    shrink,
                                    expand,
                                    wgrad,
                                    dropout_bits<AmxDropout>};

}  // namespace
}  // namespace lora_ext::cpu

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace lora_ext::cpu {
namespace {

// Linux grants the tile registers to a process that asks (Documentation/arch/x86/xstate.rst).
bool request_tiles() {
  constexpr long kArchReqXcompPerm = 0x1023;
  constexpr long kXfeatureTileData = 18;
  return syscall(SYS_arch_prctl, kArchReqXcompPerm, kXfeatureTileData) == 0;
}

bool has_amx() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) == 0) return false;
  return (edx >> 22 & 1u) != 0 && (edx >> 24 & 1u) != 0;  // AMX-BF16, AMX-TILE
}

}  // namespace

const SkinnyKernels* amx_kernels() {
  static const bool supported = has_amx() && __builtin_cpu_supports("avx512bf16") &&
                                avx512_kernels() != nullptr && request_tiles();
  return supported ? &kKernels : nullptr;
}

}  // namespace lora_ext::cpu

#else

namespace lora_ext::cpu {
const SkinnyKernels* amx_kernels() { return nullptr; }
}  // namespace lora_ext::cpu

#endif
