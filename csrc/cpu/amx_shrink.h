// shrink on AMX tiles: T = P Q.
// Included by isa_amx.cpp after its target pragma, inside its anonymous namespace.
#pragma once

// Stages rows `range` and columns [0, cols) of src, masked, zero-padded to 32 columns and 32 rows.
void stage_rows(const BFloat16* src, int64_t src_pitch, RowIndex index, Range range, int64_t cols,
                const uint32_t* bits, int64_t bits_pitch, BFloat16* dst) {
  const int64_t rows = range.end - range.begin;
  // The next block's rows come from memory, and no hardware prefetches so many streams.
  const int64_t ahead = index.at == nullptr ? kRowBlock * src_pitch : 0;
  for (int64_t m = 0; m < kRowBlock; ++m) {
    const BFloat16* in = src + (m < rows ? index[range.begin + m] : 0) * src_pitch;
    BFloat16* out = dst + m * kShrinkDepth;
    for (int64_t c = 0; c < cols; c += kTileDepth) {
      uint32_t keep = m < rows ? 0xFFFFFFFFu : 0u;
      if (cols - c < kTileDepth) keep &= (1u << (cols - c)) - 1;
      if (bits != nullptr && m < rows) keep &= bits[m * bits_pitch + c / 32];
      _mm_prefetch(reinterpret_cast<const char*>(in + ahead + c), _MM_HINT_T1);
      // Masked-off lanes are not read: no address past the row is accessed.
      const __m512i value = _mm512_maskz_loadu_epi16(keep, in + c);
      _mm512_storeu_si512(out + c, value);
    }
  }
}

// 32 rows of P: rows 16 on are `tile` elements further, the next 32 columns `step`.
struct ShrinkRows {
  const BFloat16* at;
  int64_t pitch, tile, step;
  int64_t fetch = 0;  // so many rows, as many rows ahead
};

// Adds the products of two row tiles with up to two rank tiles to sums [32, rank_pad].
template <int kRankTiles>
void shrink_tiles(const ShrinkRows& rows, int64_t steps, const BFloat16* b, int64_t b_step,
                  int64_t terms, float* sums, int64_t sums_pitch) {
  const int64_t stride = sums_pitch * kFloatBytes;
  const int64_t a_stride = rows.pitch * kHalfBytes;
  const BFloat16* a = rows.at;
  _tile_loadd(0, sums, stride);
  _tile_loadd(1, sums + kTileRows * sums_pitch, stride);
  if constexpr (kRankTiles == 2) {
    _tile_loadd(2, sums + kTileRows, stride);
    _tile_loadd(3, sums + kTileRows * sums_pitch + kTileRows, stride);
  }
  for (int64_t k = 0; k < steps; ++k, a += rows.step, b += b_step) {
    _tile_loadd(4, a, a_stride);
    _tile_loadd(5, a + rows.tile, a_stride);
    for (int64_t i = rows.fetch; i < 2 * rows.fetch; ++i) {
      _mm_prefetch(reinterpret_cast<const char*>(a + i * rows.pitch), _MM_HINT_T1);
    }
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

// A factor as pack_shrink packs it.
struct ShrinkPanel {
  const BFloat16* at;
  int64_t rank, rank_pad, terms;

  ShrinkPanel(const void* packed, int64_t ranks, bool is_half)
      : at(static_cast<const BFloat16*>(packed)),
        rank(ranks),
        rank_pad(round_up(ranks, kTileRows)),
        terms(is_half ? 1 : 2) {}
  // Adds the products of 32 rows, so many steps of 32 columns from the first on, to sums [32, rank_pad].
  void multiply(const ShrinkRows& rows, Range steps, float* sums) const {
    const int64_t step = rank_pad / kTileRows * terms * kTileElements;
    const int64_t count = steps.end - steps.begin;
    const BFloat16* b = at + steps.begin * step;
    int64_t j = 0;
    for (; j + 2 * kTileRows <= rank_pad; j += 2 * kTileRows, b += 2 * terms * kTileElements) {
      shrink_tiles<2>(rows, count, b, step, terms, sums + j, rank_pad);
    }
    if (j < rank_pad) shrink_tiles<1>(rows, count, b, step, terms, sums + j, rank_pad);
  }
  // t [rows, rank] = scale * sums
  void store(const float* sums, int64_t rows, float scale, float* t) const {
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < rank; ++j) t[i * rank + j] = scale * sums[i * rank_pad + j];
    }
  }
};

int64_t shrink_bytes(int64_t rank) {
  return kRowBlock * (kShrinkDepth * kHalfBytes + round_up(rank, kTileRows) * kFloatBytes);
}

void shrink(const ShrinkArgs& args, Range rows) {
  const TileConfig config;
  const ShrinkPanel q(args.q, args.rank, args.q_is_half);
  const bool drop = args.dropout.enabled();
  auto* staged = static_cast<BFloat16*>(args.work);  // [kRowBlock, kShrinkDepth]
  auto* sums =
      reinterpret_cast<float*>(staged + kRowBlock * kShrinkDepth);  // [kRowBlock, rank_pad]
  uint32_t bits[kRowBlock * kShrinkDepth / 32];
  for (int64_t m = rows.begin; m < rows.end; m += kRowBlock) {
    const int64_t block_rows = std::min(kRowBlock, rows.end - m);
    const Range block{m, m + block_rows};
    std::memset(sums, 0, static_cast<size_t>(kRowBlock * q.rank_pad) * sizeof(float));
    for (int64_t c = 0; c < args.cols; c += kShrinkDepth) {
      const int64_t depth = std::min(kShrinkDepth, args.cols - c);
      const auto* p = static_cast<const BFloat16*>(args.p) + c;
      ShrinkRows a{p + m * args.p_pitch, args.p_pitch, kTileRows * args.p_pitch, kTileDepth,
                   kRowBlock};
      if (drop) {
        dropout_bits<AmxDropout>(args.dropout, args.rows, block, {c, c + depth}, bits,
                                 kShrinkDepth / 32);
      }
      if (drop || args.rows.at != nullptr || block_rows < kRowBlock || depth % kTileDepth != 0) {
        stage_rows(p, args.p_pitch, args.rows, block, depth, drop ? bits : nullptr,
                   kShrinkDepth / 32, staged);
        a = {staged, kShrinkDepth, kTileRows * kShrinkDepth, kTileDepth};
      }
      q.multiply(a, {c / kTileDepth, (c + depth + kTileDepth - 1) / kTileDepth}, sums);
    }
    q.store(sums, block_rows, args.scale, args.t + m * args.rank);
  }
}
