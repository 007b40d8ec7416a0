// The skinny passes of skinny.h in vector code, for the instruction set of the including file.
//
// Included after `#pragma GCC target`, inside an anonymous namespace per file. All three passes
// are one micro-kernel, C[i, lanes] += sum_k A(i, k) B[k, lanes] with A broadcast, over blocks
// that fit the first-level cache; what differs is which operand is staged:
//
//              i       k       lanes    A                B
//     shrink   row     column  rank     staged P         packed Q [cols, rank_pad]
//     expand   row     rank    column   T                packed U [rank, cols_pad]
//     wgrad    rank    row     column   T (transposed)   staged P
//
// Staging reads P once, converts it to float and zeroes what dropout drops.
#pragma once

constexpr int64_t kShrinkDepth = 128;  // columns per staged block of shrink
constexpr int64_t kRowBlock = 24;      // rows per staged block of shrink: 12 KB of floats
constexpr int64_t kColBlock = 128;     // columns per block of expand and wgrad
constexpr int64_t kStagedRows = 64;    // rows per staged block of wgrad: 32 KB of floats
constexpr int64_t kExpandRows = 16;    // rows per block of expand: 8 KB of sums
constexpr int64_t kRowGranule = 4;
constexpr int64_t kColGranule = 32;  // one word of dropout bits

template <class Isa, int kRows, int kVecs>
void micro_kernel(int64_t depth, const float* a, int64_t a_row, int64_t a_depth, const float* b,
                  int64_t b_pitch, float* c, int64_t c_pitch) {
  using Vec = typename Isa::Vec;
  Vec accum[kRows][kVecs];
  for (int i = 0; i < kRows; ++i) {
    for (int v = 0; v < kVecs; ++v) accum[i][v] = Isa::zero();
  }
  for (int64_t k = 0; k < depth; ++k) {
    Vec lanes[kVecs];
    for (int v = 0; v < kVecs; ++v) lanes[v] = Isa::load(b + k * b_pitch + v * Isa::kLanes);
    for (int i = 0; i < kRows; ++i) {
      const Vec scalar = Isa::broadcast(a[i * a_row + k * a_depth]);
      for (int v = 0; v < kVecs; ++v) accum[i][v] = Isa::fma(scalar, lanes[v], accum[i][v]);
    }
  }
  // Each block's sum starts at zero and is added once: a shorter chain of roundings than one
  // running sum over all columns.
  for (int i = 0; i < kRows; ++i) {
    for (int v = 0; v < kVecs; ++v) {
      float* out = c + i * c_pitch + v * Isa::kLanes;
      Isa::store(out, Isa::add(Isa::load(out), accum[i][v]));
    }
  }
}

template <class Isa, int kRows>
void micro_rows(int64_t lanes, int64_t depth, const float* a, int64_t a_row, int64_t a_depth,
                const float* b, int64_t b_pitch, float* c, int64_t c_pitch) {
  int64_t j = 0;
  for (; j + 2 * Isa::kLanes <= lanes; j += 2 * Isa::kLanes) {
    micro_kernel<Isa, kRows, 2>(depth, a, a_row, a_depth, b + j, b_pitch, c + j, c_pitch);
  }
  if (j < lanes) {
    micro_kernel<Isa, kRows, 1>(depth, a, a_row, a_depth, b + j, b_pitch, c + j, c_pitch);
  }
}

// C[i, :lanes] += sum_k A(i, k) B[k, :lanes]; lanes is a multiple of Isa::kLanes.
template <class Isa>
void multiply_block(int64_t rows, int64_t lanes, int64_t depth, const float* a, int64_t a_row,
                    int64_t a_depth, const float* b, int64_t b_pitch, float* c, int64_t c_pitch) {
  int64_t i = 0;
  const auto run = [&](auto tile_rows) {
    constexpr int kRows = decltype(tile_rows)::value;
    for (; i + kRows <= rows; i += kRows) {
      micro_rows<Isa, kRows>(lanes, depth, a + i * a_row, a_row, a_depth, b, b_pitch,
                             c + i * c_pitch, c_pitch);
    }
  };
  if constexpr (Isa::kTileRows > 8) {
    if (rows % 8 != 0) run(std::integral_constant<int, Isa::kTileRows>{});
    run(std::integral_constant<int, 8>{});
  } else {
    run(std::integral_constant<int, Isa::kTileRows>{});
  }
  run(std::integral_constant<int, 4>{});
  run(std::integral_constant<int, 1>{});
}

// dst[m, c] = keep(m, c) ? float(src[index[rows.begin + m], c]) : 0, with zeros from cols to
// cols_pad.
template <class Isa, class T>
void stage(const T* src, int64_t src_pitch, RowIndex index, Range rows, int64_t cols,
           int64_t cols_pad, const uint32_t* bits, int64_t bits_pitch, float* dst,
           int64_t dst_pitch) {
  constexpr int64_t kLanes = Isa::kLanes;
  const int64_t whole = cols / kLanes * kLanes;
  for (int64_t m = 0; m < rows.end - rows.begin; ++m) {
    const T* in = src + index[rows.begin + m] * src_pitch;
    const uint32_t* keep = bits == nullptr ? nullptr : bits + m * bits_pitch;
    float* out = dst + m * dst_pitch;
    if (bits != nullptr) {
      for (int64_t c = 0; c < whole; c += kLanes) {
        Isa::store(out + c, Isa::keep(Isa::load(in + c), keep[c / 32] >> (c % 32)));
      }
    } else {
      for (int64_t c = 0; c < whole; c += kLanes) Isa::store(out + c, Isa::load(in + c));
    }
    for (int64_t c = whole; c < cols; ++c) {
      const bool kept = bits == nullptr || (keep[c / 32] >> (c % 32) & 1u) != 0;
      out[c] = kept ? to_float(in[c]) : 0.0f;
    }
    for (int64_t c = cols; c < cols_pad; ++c) out[c] = 0.0f;
  }
}

// y[index[rows.begin + m], c] += scale * keep(m, c) * sum[m, c]
template <class Isa, class T>
void add_block(T* y, int64_t y_pitch, RowIndex index, Range rows, int64_t cols,
               const uint32_t* bits, int64_t bits_pitch, float scale, const float* sum,
               int64_t sum_pitch) {
  constexpr int64_t kLanes = Isa::kLanes;
  const int64_t whole = cols / kLanes * kLanes;
  const auto factor = Isa::broadcast(scale);
  for (int64_t m = 0; m < rows.end - rows.begin; ++m) {
    T* out = y + index[rows.begin + m] * y_pitch;
    const float* in = sum + m * sum_pitch;
    const uint32_t* keep = bits == nullptr ? nullptr : bits + m * bits_pitch;
    for (int64_t c = 0; c < whole; c += kLanes) {
      auto delta = Isa::multiply(Isa::load(in + c), factor);
      if (bits != nullptr) delta = Isa::keep(delta, keep[c / 32] >> (c % 32));
      Isa::store(out + c, Isa::add(Isa::load(out + c), delta));
    }
    for (int64_t c = whole; c < cols; ++c) {
      const bool kept = bits == nullptr || (keep[c / 32] >> (c % 32) & 1u) != 0;
      const float delta = in[c] * scale;  // rounded before the add, as PEFT does
      from_float(to_float(out[c]) + (kept ? delta : 0.0f), &out[c]);
    }
  }
}

template <class Isa, class T>
void shrink(const ShrinkArgs& args, Range rows) {
  const int64_t rank_pad = round_up(args.rank, Isa::kLanes);
  const float* q = static_cast<const float*>(args.q);
  alignas(64) float staged[kRowBlock * kShrinkDepth];
  alignas(64) float sums[kRowBlock * kMaxRank];
  uint32_t bits[kRowBlock * kShrinkDepth / 32];
  for (int64_t m = rows.begin; m < rows.end; m += kRowBlock) {
    const int64_t block_rows = std::min(kRowBlock, rows.end - m);
    const Range block{m, m + block_rows};
    std::fill_n(sums, block_rows * rank_pad, 0.0f);
    for (int64_t c = 0; c < args.cols; c += kShrinkDepth) {
      const int64_t depth = std::min(kShrinkDepth, args.cols - c);
      const float* a = staged;
      int64_t a_pitch = kShrinkDepth;
      const bool drop = args.dropout.enabled();
      if (drop) {
        dropout_bits<Isa>(args.dropout, args.rows, block, {c, c + depth}, bits, kShrinkDepth / 32);
      }
      if constexpr (std::is_same_v<T, float>) {
        if (!drop && args.rows.at == nullptr) {
          a = element<T>(args.p, m * args.p_pitch + c);
          a_pitch = args.p_pitch;
        }
      }
      if (a == staged) {
        stage<Isa>(element<T>(args.p, c), args.p_pitch, args.rows, block, depth, depth,
                   drop ? bits : nullptr, kShrinkDepth / 32, staged, kShrinkDepth);
      }
      multiply_block<Isa>(block_rows, rank_pad, depth, a, a_pitch, 1, q + c * rank_pad, rank_pad,
                          sums, rank_pad);
    }
    for (int64_t i = 0; i < block_rows; ++i) {
      float* t = args.t + (m + i) * args.rank;
      for (int64_t j = 0; j < args.rank; ++j) t[j] = args.scale * sums[i * rank_pad + j];
    }
  }
}

// Y += scale * mask * (T U) for at most kExpandRows rows and kColBlock columns at (row, col).
// `bits` is the mask of that block, null without dropout.
template <class Isa, class T>
void expand_block(const ExpandArgs& args, int64_t row, int64_t rows, int64_t col, int64_t cols,
                  const uint32_t* bits, int64_t bits_pitch) {
  alignas(64) float sums[kExpandRows * kColBlock];
  const int64_t lanes = round_up(cols, Isa::kLanes);
  for (int64_t i = 0; i < rows; ++i) std::fill_n(sums + i * kColBlock, lanes, 0.0f);
  const float* t = static_cast<const float*>(args.t) + row * args.rank;
  multiply_block<Isa>(rows, lanes, args.rank, t, args.rank, 1,
                      static_cast<const float*>(args.u) + col, expand_pitch<Isa>(args.cols), sums,
                      kColBlock);
  add_block<Isa>(static_cast<T*>(args.y) + col, args.y_pitch, args.rows, {row, row + rows}, cols,
                 bits, bits_pitch, args.scale, sums, kColBlock);
}

template <class Isa, class T>
void expand(const ExpandArgs& args, Range rows) {
  uint32_t bits[kExpandRows * kColBlock / 32];
  const bool drop = args.dropout.enabled();
  for (int64_t m = rows.begin; m < rows.end; m += kExpandRows) {
    const int64_t block_rows = std::min(kExpandRows, rows.end - m);
    for (int64_t c = 0; c < args.cols; c += kColBlock) {
      const int64_t block_cols = std::min(kColBlock, args.cols - c);
      if (drop) {
        dropout_bits<Isa>(args.dropout, args.rows, {m, m + block_rows}, {c, c + block_cols}, bits,
                          kColBlock / 32);
      }
      expand_block<Isa, T>(args, m, block_rows, c, block_cols, drop ? bits : nullptr,
                           kColBlock / 32);
    }
  }
}

int64_t wgrad_bytes(int64_t rank) { return rank * kColBlock * 4; }

template <class Isa, class T>
void wgrad(const WgradArgs& args, const ExpandArgs& expand, Range cols) {
  constexpr int64_t kBitsPitch = kColBlock / 32;
  const bool drop = args.dropout.enabled();
  alignas(64) float staged[kStagedRows * kColBlock];
  auto* sums = static_cast<float*>(args.work);
  uint32_t bits[kStagedRows * kBitsPitch];
  for (int64_t c = cols.begin; c < cols.end; c += kColBlock) {
    const int64_t block_cols = std::min(kColBlock, cols.end - c);
    const int64_t lanes = round_up(block_cols, Isa::kLanes);
    std::fill_n(sums, args.rank * kColBlock, 0.0f);
    for (int64_t m = 0; m < args.rows; m += kStagedRows) {
      const int64_t block_rows = std::min(kStagedRows, args.rows - m);
      const Range block{m, m + block_rows};
      if (drop) {
        dropout_bits<Isa>(args.dropout, args.row_index, block, {c, c + block_cols}, bits,
                          kBitsPitch);
      }
      stage<Isa>(element<T>(args.p, c), args.p_pitch, args.row_index, block, block_cols, lanes,
                 drop ? bits : nullptr, kBitsPitch, staged, kColBlock);
      const float* t = static_cast<const float*>(args.t) + m * args.rank;
      multiply_block<Isa>(args.rank, lanes, block_rows, t, 1, args.rank, staged, kColBlock, sums,
                          kColBlock);
      if (expand.y == nullptr) continue;
      for (int64_t i = 0; i < block_rows; i += kExpandRows) {
        expand_block<Isa, T>(expand, m + i, std::min(kExpandRows, block_rows - i), c, block_cols,
                             drop ? bits + i * kBitsPitch : nullptr, kBitsPitch);
      }
    }
    store_wgrad(args, {c, c + block_cols}, sums, kColBlock);
  }
}
