// Up to 14 rows by 32 columns of sums, by vdpbf16ps, in registers over the whole depth.
// Included by isa_avx512_bf16.cpp after its target pragma, inside its anonymous namespace.
#pragma once

// 28 registers of sums, two of columns and one of rows: 31 of 32.
constexpr int kDotRows = 14;

// Rows of P or T: row i of a step of 32 of the depth at 32 i, the next step's `step` further.
struct DotRows {
  const BFloat16* at;
  int64_t step;
};

// Columns of Q, of U, or ranks of a factor: vectors of 16 pairs, the next 16 columns `second` further,
// the next 32 of the depth `step` further.
struct DotColumns {
  const BFloat16* at;
  int64_t second, step;
};

// Rows that are copied next, to be fetched meanwhile: a line of each for a step of the depth.
struct DotFetch {
  const BFloat16* const* rows;
  int64_t count;
};

// sums[i][c] += sum over `depth` of row i times the columns of vector c
template <int kRows, int kVectors>
[[gnu::always_inline]] inline void add_products(DotRows rows, DotColumns columns, int64_t depth,
                                                __m512 (&sums)[kRows][kVectors],
                                                DotFetch fetch = {}) {
  for (int64_t k = 0; depth > 0;
       depth -= kTileDepth, k += kTileDepth, rows.at += rows.step, columns.at += columns.step) {
    for (int64_t i = 0; i < fetch.count; ++i) _mm_prefetch(fetch.rows[i] + k, _MM_HINT_T1);
    const BFloat16 *row = rows.at, *column = columns.at;
    const BFloat16* const end = row + std::min(depth, kTileDepth);
    for (; row < end; row += 2, column += kTileDepth) {
      __m512bh right[kVectors];
      for (int c = 0; c < kVectors; ++c) {
        std::memcpy(&right[c], column + c * columns.second, sizeof(right[c]));
      }
#pragma GCC unroll 14
      for (int i = 0; i < kRows; ++i) {
        int32_t pair;
        std::memcpy(&pair, row + i * kTileDepth, sizeof(pair));
        const __m512i left = _mm512_set1_epi32(pair);
        for (int c = 0; c < kVectors; ++c) {
          sums[i][c] = _mm512_dpbf16_ps(sums[i][c], (__m512bh)left, right[c]);
        }
      }
    }
  }
}

// Where rows of 32 sums are rounded and stored, at most `exists` of each.
struct DotStore {
  BFloat16* y;  // row 0 of the layer, at the first column
  int64_t pitch;
  RowIndex rows;
  int64_t first;  // row of the layer
  __mmask32 exists;
  const BFloat16* bias;

  void row(int64_t i, __m512 low, __m512 high) const {
    if (bias != nullptr) {
      const __m512i value = _mm512_maskz_loadu_epi16(exists, bias);
      low = _mm512_add_ps(low, to_wide(_mm512_castsi512_si256(value)));
      high = _mm512_add_ps(high, to_wide(_mm512_extracti64x4_epi64(value, 1)));
    }
    const __m512bh rounded = _mm512_cvtne2ps_pbh(high, low);
    BFloat16* to = y + rows[first + i] * pitch;
    if (exists == 0xFFFFFFFFu) {
      std::memcpy(to, &rounded, sizeof(rounded));
    } else {
      _mm512_mask_storeu_epi16(to, exists, (__m512i)rounded);
    }
  }
};

// P Q, and with a depth T U onto the same sums, which begin as `from`, [rows, 32], or null: zeros.
struct DotTile {
  DotRows p, t;
  DotColumns q, u;
  int64_t depth, t_depth;
  const float* from;
  DotFetch fetch;
};

// Stored if `to` is null, else left there: [kRows, 32].
template <int kRows>
void dot_tile(const DotTile& tile, const DotStore& store, float* to) {
  __m512 sums[kRows][2];
#pragma GCC unroll 14
  for (int i = 0; i < kRows; ++i) {
    for (int c = 0; c < 2; ++c) {
      sums[i][c] = tile.from == nullptr ? _mm512_setzero_ps()
                                        : _mm512_load_ps(tile.from + i * kRowBlock + 16 * c);
    }
  }
  add_products(tile.p, tile.q, tile.depth, sums, tile.fetch);
  add_products(tile.t, tile.u, tile.t_depth, sums);
#pragma GCC unroll 14
  for (int i = 0; i < kRows; ++i) {
    if (to == nullptr) {
      store.row(i, sums[i][0], sums[i][1]);
    } else {
      _mm512_store_ps(to + i * kRowBlock, sums[i][0]);
      _mm512_store_ps(to + i * kRowBlock + 16, sums[i][1]);
    }
  }
}

// 16 ranks of a factor: of bfloat16 columns as above; of floats [depth, step], which are multiplied
// as floats: two terms of bfloat16 gave gradients 7 to 10 times the error.
struct DotRanks {
  const void* at;
  int64_t step;
  bool is_half;
};

// to: [kRows, 16] = rows times the ranks.
template <int kRows>
void dot_shrink(const DotRows& rows, const DotRanks& ranks, int64_t depth, float* to) {
  __m512 sums[kRows][1];
#pragma GCC unroll 14
  for (int i = 0; i < kRows; ++i) sums[i][0] = _mm512_setzero_ps();
  if (ranks.is_half) {
    add_products(rows, {static_cast<const BFloat16*>(ranks.at), 0, ranks.step}, depth, sums);
  } else {
    const __m512i high = _mm512_set1_epi32(static_cast<int>(0xFFFF0000u));
    const auto* factor = static_cast<const float*>(ranks.at);
    const BFloat16* at = rows.at;
    for (int64_t k = 0; k < depth; k += 2, factor += 2 * ranks.step, at += 2) {
      if (k > 0 && k % kTileDepth == 0) at += rows.step - kTileDepth;
      const __m512 even = _mm512_loadu_ps(factor);
      const __m512 odd = k + 1 < depth ? _mm512_loadu_ps(factor + ranks.step) : _mm512_setzero_ps();
#pragma GCC unroll 14
      for (int i = 0; i < kRows; ++i) {
        int32_t pair;
        std::memcpy(&pair, at + i * kTileDepth, sizeof(pair));
        const __m512i left = _mm512_set1_epi32(pair);
        sums[i][0] =
            _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_slli_epi32(left, 16)), even, sums[i][0]);
        sums[i][0] =
            _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_and_si512(left, high)), odd, sums[i][0]);
      }
    }
  }
#pragma GCC unroll 14
  for (int i = 0; i < kRows; ++i) _mm512_store_ps(to + i * kTileRows, sums[i][0]);
}

// The functions for 1 to 14 rows.
struct DotFunctions {
  void (*tile)(const DotTile&, const DotStore&, float*);
  void (*shrink)(const DotRows&, const DotRanks&, int64_t, float*);
};

template <size_t... kIndex>
constexpr std::array<DotFunctions, sizeof...(kIndex)> dot_functions(
    std::index_sequence<kIndex...>) {
  return {{{dot_tile<kIndex + 1>, dot_shrink<kIndex + 1>}...}};
}

constexpr auto kDotFunctions = dot_functions(std::make_index_sequence<kDotRows>{});

inline const DotFunctions& dots_of(int64_t rows) {
  return kDotFunctions[static_cast<size_t>(rows - 1)];
}
