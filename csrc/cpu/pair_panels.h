// Factors, T and Q packed in pairs of the depth: the right sides of AMX tiles and of vdpbf16ps.
// Included by isa_amx.cpp and isa_avx512_bf16.cpp after their target pragma, inside their anonymous
// namespaces.
#pragma once

// Panel: for each 32 columns, each 16 ranks, each term, one B tile: [16 column pairs][16 ranks][2].
int64_t shrink_panel_bytes(int64_t rank, int64_t cols) {
  return round_up(cols, kTileDepth) * round_up(rank, kTileRows) * 2 * kHalfBytes;
}

// 16 columns of a rank, from c on; zeros past the last.
inline Split columns_of(const AdapterView& adapter, int64_t rank, int64_t c) {
  const int64_t index = rank * adapter.rank_pitch + c * adapter.col_pitch;
  return Split(load_adapter(adapter, index, adapter.col_pitch, adapter.cols - c));
}

void pack_shrink(const AdapterView& adapter, void* panel) {
  const bool is_half = adapter.dtype == Dtype::kBFloat16;
  const int64_t terms = is_half ? 1 : 2;
  auto* out = static_cast<BFloat16*>(panel);
  for (int64_t c = 0; c < adapter.cols; c += kTileDepth) {
    for (int64_t j = 0; j < adapter.rank; j += kTileRows, out += terms * kTileElements) {
      const int64_t ranks = std::min(kTileRows, adapter.rank - j);
      if (adapter.col_pitch == 1) {
        __m512i high[kTileRows] = {}, low[kTileRows] = {};
        for (int64_t i = 0; i < ranks; ++i) {
          if (is_half) {
            const auto* in =
                static_cast<const BFloat16*>(adapter.data) + (j + i) * adapter.rank_pitch;
            high[i] = _mm512_maskz_loadu_epi16(first_halves(adapter.cols - c), in + c);
            continue;
          }
          const Split first = columns_of(adapter, j + i, c),
                      second = columns_of(adapter, j + i, c + 16);
          high[i] = joined(first.hi, second.hi), low[i] = joined(first.lo, second.lo);
        }
        transpose_pairs(high, out);
        if (!is_half) transpose_pairs(low, out + kTileElements);
        continue;
      }
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

// Q's columns of a task, for some steps of 32 of the depth: blocks of 32 columns, `pitch` apart.
void pack_q(const FusedProduct& product, const ProductTask& task, Range outer, int64_t pitch,
            BFloat16* to) {
  const MatrixView& q = product.q;
  const auto* in = static_cast<const BFloat16*>(task.part->q) + task.cols.begin * q.col_pitch;
  const int64_t cols = task.cols.end - task.cols.begin;
  const int64_t blocks = round_up(cols, kRowBlock) / kRowBlock;
  const auto tiles_at = [&](int64_t block, int64_t step) {
    return to + block * pitch + (step - outer.begin) * kStepElements;
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

// Consecutive rows of a block with one update, or with none.
struct Span {
  Range rows;
  const RowUpdate* update;
};

// Those of `count` rows from m on; how many.
int64_t spans_of(const std::vector<RowUpdate>& updates, int64_t m, int64_t count, Span* spans) {
  auto update = std::partition_point(updates.begin(), updates.end(),
                                     [&](const RowUpdate& each) { return each.rows.end <= m; });
  int64_t found = 0;
  for (int64_t row = m; row < m + count;) {
    const bool is_any = update != updates.end() && update->rows.begin < m + count;
    if (is_any && update->rows.begin <= row) {
      const int64_t end = std::min(update->rows.end, m + count);
      spans[found++] = {{row, end}, &*update++};
      row = end;
    } else {
      const int64_t end = is_any ? update->rows.begin : m + count;
      spans[found++] = {{row, end}, nullptr};
      row = end;
    }
  }
  return found;
}
