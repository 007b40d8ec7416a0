// Shrink and expand for so few rows that packing a factor would cost more than its product: the
// factor is read once, in its original layout. And the table of all passes.
//
// Included after `#pragma GCC target` and simd_passes.h, inside an anonymous namespace per file.
//
//     shrink   along the columns   T[m, j] = sum over lanes of sum_c P[m, c] Q[c, j]
//              along the rank      four sums of every fourth column, added at the end
//     expand   along the rank      blocks of columns x ranks are transposed in registers, then as
//              in simd_passes.h: one sum over ranks in order, the same bits
//              along the columns   the same without the transposition
#pragma once

constexpr int64_t kFewDepth = 1024;  // staged columns: 16 KB of floats

template <class Isa>
float sum_of_lanes(typename Isa::Vec v) {
  alignas(64) float lanes[Isa::kLanes];
  Isa::store(lanes, v);
  for (int64_t width = Isa::kLanes / 2; width > 0; width /= 2) {
    for (int64_t i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  }
  return lanes[0];
}

// sums[m][j] += sum_c p[m][c] q[j][c] for kRows rows and kRanks ranks; p is padded with zeros.
template <class Isa, int kRows, int kRanks, class T>
void dot_ranks(const float* p, const T* q, int64_t q_pitch, int64_t depth, float* sums,
               int64_t sums_pitch) {
  using Vec = typename Isa::Vec;
  Vec accum[kRanks][kRows];
  for (int j = 0; j < kRanks; ++j) {
    for (int m = 0; m < kRows; ++m) accum[j][m] = Isa::zero();
  }
  const auto step = [&](int64_t c, auto&& load_q) {
    Vec values[kRows];
    for (int m = 0; m < kRows; ++m) values[m] = Isa::load(p + m * kFewDepth + c);
    for (int j = 0; j < kRanks; ++j) {
      const Vec factor = load_q(q + j * q_pitch + c);
      for (int m = 0; m < kRows; ++m) accum[j][m] = Isa::fma(factor, values[m], accum[j][m]);
    }
  };
  const int64_t whole = depth / Isa::kLanes * Isa::kLanes;
  for (int64_t c = 0; c < whole; c += Isa::kLanes) {
    step(c, [](const T* in) { return Isa::load(in); });
  }
  if (whole < depth) {
    step(whole, [&](const T* in) { return Isa::load_first(in, depth - whole); });
  }
  for (int j = 0; j < kRanks; ++j) {
    for (int m = 0; m < kRows; ++m) sums[m * sums_pitch + j] += sum_of_lanes<Isa>(accum[j][m]);
  }
}

template <class Isa, int kRows, class T>
void dot_block(const float* p, const T* q, int64_t q_pitch, int64_t rank, int64_t depth,
               float* sums, int64_t sums_pitch) {
  // By the accumulators; and at most 8 rows of Q, which may compete for lines of the cache.
  constexpr int kRanks = std::min(8, (Isa::kTileRows > 8 ? 16 : 8) / kRows);
  int64_t j = 0;
  for (; j + kRanks <= rank; j += kRanks) {
    dot_ranks<Isa, kRows, kRanks>(p, q + j * q_pitch, q_pitch, depth, sums + j, sums_pitch);
  }
  for (; j < rank; ++j) {
    dot_ranks<Isa, kRows, 1>(p, q + j * q_pitch, q_pitch, depth, sums + j, sums_pitch);
  }
}

// sums[m][j] += sum_c p[m][c] q[c][j] for kRows rows and the lanes at j.
template <class Isa, int kRows, class LoadQ>
void broadcast_lanes(const float* p, int64_t depth, const LoadQ& load_q, float* sums,
                     int64_t sums_pitch) {
  using Vec = typename Isa::Vec;
  constexpr int kChains = 4;
  Vec accum[kChains][kRows];
  for (int chain = 0; chain < kChains; ++chain) {
    for (int m = 0; m < kRows; ++m) accum[chain][m] = Isa::zero();
  }
  const auto step = [&](int64_t c, int chain) {
    const Vec factor = load_q(c);
    for (int m = 0; m < kRows; ++m) {
      accum[chain][m] = Isa::fma(Isa::broadcast(p[m * kFewDepth + c]), factor, accum[chain][m]);
    }
  };
  int64_t c = 0;
  for (; c + kChains <= depth; c += kChains) {
    for (int chain = 0; chain < kChains; ++chain) step(c + chain, chain);
  }
  for (; c < depth; ++c) step(c, 0);
  for (int m = 0; m < kRows; ++m) {
    const Vec low = Isa::add(accum[0][m], accum[1][m]);
    const Vec all = Isa::add(low, Isa::add(accum[2][m], accum[3][m]));
    float* out = sums + m * sums_pitch;
    Isa::store(out, Isa::add(Isa::load(out), all));
  }
}

template <class Isa, int kRows, class T>
void broadcast_block(const float* p, const T* q, int64_t q_pitch, int64_t rank, int64_t depth,
                     float* sums, int64_t sums_pitch) {
  for (int64_t j = 0; j < rank; j += Isa::kLanes) {
    const int64_t count = rank - j;
    if (count >= Isa::kLanes) {
      broadcast_lanes<Isa, kRows>(
          p, depth, [&](int64_t c) { return Isa::load(q + c * q_pitch + j); }, sums + j,
          sums_pitch);
    } else {
      broadcast_lanes<Isa, kRows>(
          p, depth, [&](int64_t c) { return Isa::load_first(q + c * q_pitch + j, count); },
          sums + j, sums_pitch);
    }
  }
}

// Computes `kRows` rows of T from `row` on.
template <class Isa, int kRows, class T, class Factor>
void shrink_few_rows(const ShrinkArgs& args, const AdapterView& q, int64_t row) {
  const int64_t rank_pad = round_up(args.rank, Isa::kLanes);
  alignas(64) float staged[kRows * kFewDepth];
  alignas(64) float sums[kRows * kMaxRank];
  uint32_t bits[kRows * kFewDepth / 32];
  const bool drop = args.dropout.enabled();
  const Range rows{row, row + kRows};
  std::fill_n(sums, kRows * rank_pad, 0.0f);
  for (int64_t c = 0; c < args.cols; c += kFewDepth) {
    const int64_t depth = std::min(kFewDepth, args.cols - c);
    if (drop) {
      dropout_bits<Isa>(args.dropout, args.rows, rows, {c, c + depth}, bits, kFewDepth / 32);
    }
    stage<Isa>(element<T>(args.p, c), args.p_pitch, args.rows, rows, depth,
               round_up(depth, Isa::kLanes), drop ? bits : nullptr, kFewDepth / 32, staged,
               kFewDepth);
    const auto* factor = element<Factor>(q.data, c * q.col_pitch);
    if (q.col_pitch == 1) {
      dot_block<Isa, kRows>(staged, factor, q.rank_pitch, args.rank, depth, sums, rank_pad);
    } else {
      broadcast_block<Isa, kRows>(staged, factor, q.col_pitch, args.rank, depth, sums, rank_pad);
    }
  }
  for (int64_t i = 0; i < kRows; ++i) {
    float* t = args.t + (row + i) * args.rank;
    for (int64_t j = 0; j < args.rank; ++j) t[j] = args.scale * sums[i * rank_pad + j];
  }
}

// Loads U from (rank j, column c) on: lanes of up to `cols` columns for each of `ranks` ranks.
template <class Isa, class Factor>
void load_ranks(const AdapterView& u, int64_t j, int64_t c, int64_t cols, int64_t ranks,
                typename Isa::Vec (&block)[Isa::kLanes]) {
  const auto* first = element<Factor>(u.data, c * u.col_pitch + j * u.rank_pitch);
  if (u.col_pitch != 1) return load_block<Isa>(first, u.col_pitch, cols, ranks, block);
  for (int64_t i = 0; i < ranks; ++i) {
    block[i] = Isa::load_first(first + i * u.rank_pitch, cols);
  }
}

// Y += scale * mask * (T U) for `kRows` rows from `row` on; u along the rank or the columns.
template <class Isa, int kRows, class T, class Factor>
void expand_few_rows(const ExpandArgs& args, const AdapterView& u, int64_t row) {
  using Vec = typename Isa::Vec;
  constexpr int64_t kLanes = Isa::kLanes;
  const float* t = static_cast<const float*>(args.t) + row * args.rank;
  uint32_t bits[kRows * kColBlock / 32];
  alignas(64) float sums[kRows * kColBlock];
  const bool drop = args.dropout.enabled();
  const Range rows{row, row + kRows};
  for (int64_t c0 = 0; c0 < args.cols; c0 += kColBlock) {
    const int64_t cols = std::min(kColBlock, args.cols - c0);
    for (int64_t c = 0; c < cols; c += kLanes) {
      Vec accum[kRows];
      for (int m = 0; m < kRows; ++m) accum[m] = Isa::zero();
      for (int64_t j = 0; j < args.rank; j += kLanes) {
        const int64_t ranks = std::min(kLanes, args.rank - j);
        Vec block[kLanes];
        load_ranks<Isa, Factor>(u, j, c0 + c, cols - c, ranks, block);
        const auto add = [&](int64_t i) {
          for (int m = 0; m < kRows; ++m) {
            accum[m] = Isa::fma(Isa::broadcast(t[m * args.rank + j + i]), block[i], accum[m]);
          }
        };
        if (ranks == kLanes) {
          for (int i = 0; i < kLanes; ++i) add(i);
        } else {
          for (int64_t i = 0; i < ranks; ++i) add(i);
        }
      }
      for (int m = 0; m < kRows; ++m) Isa::store(sums + m * kColBlock + c, accum[m]);
    }
    if (drop) {
      dropout_bits<Isa>(args.dropout, args.rows, rows, {c0, c0 + cols}, bits, kColBlock / 32);
    }
    add_block<Isa>(static_cast<T*>(args.y) + c0, args.y_pitch, args.rows, rows, cols,
                   drop ? bits : nullptr, kColBlock / 32, args.scale, sums, kColBlock);
  }
}

// Calls run(integral_constant<rows>, first row) for all rows in steps of 4, 2 and 1.
template <class Run>
void for_few_rows(Range rows, const Run& run) {
  int64_t row = rows.begin;
  for (; row + 4 <= rows.end; row += 4) run(std::integral_constant<int, 4>{}, row);
  for (; row + 2 <= rows.end; row += 2) run(std::integral_constant<int, 2>{}, row);
  for (; row < rows.end; ++row) run(std::integral_constant<int, 1>{}, row);
}

template <class Isa>
void shrink_few(const ShrinkArgs& args, const AdapterView& q, Range rows) {
  with_dtype(args.dtype, [&](auto type) {
    with_dtype(q.dtype, [&](auto factor) {
      for_few_rows(rows, [&](auto count, int64_t row) {
        shrink_few_rows<Isa, decltype(count)::value, decltype(type), decltype(factor)>(args, q,
                                                                                       row);
      });
    });
  });
}

template <class Isa>
void expand_few(const ExpandArgs& args, const AdapterView& u, Range rows) {
  with_dtype(args.dtype, [&](auto type) {
    with_dtype(u.dtype, [&](auto factor) {
      for_few_rows(rows, [&](auto count, int64_t row) {
        expand_few_rows<Isa, decltype(count)::value, decltype(type), decltype(factor)>(args, u,
                                                                                       row);
      });
    });
  });
}

// ---- the table of all passes ----

template <class Isa>
void shrink_any(const ShrinkArgs& args, Range rows) {
  with_dtype(args.dtype, [&](auto type) { shrink<Isa, decltype(type)>(args, rows); });
}

template <class Isa>
void expand_any(const ExpandArgs& args, Range rows) {
  with_dtype(args.dtype, [&](auto type) { expand<Isa, decltype(type)>(args, rows); });
}

template <class Isa>
void wgrad_any(const WgradArgs& args, const ExpandArgs& expand, Range cols) {
  with_dtype(args.dtype, [&](auto type) { wgrad<Isa, decltype(type)>(args, expand, cols); });
}

template <class Isa>
constexpr SkinnyKernels make_kernels(const char* name) {
  return {name,
          kRowGranule,
          kColGranule,
          shrink_panel_bytes<Isa>,
          pack_shrink<Isa>,
          expand_panel_bytes<Isa>,
          pack_expand<Isa>,
          TLayout{kRowGranule, nullptr, nullptr},
          TLayout{kRowGranule, nullptr, nullptr},
          [](int64_t) { return int64_t{0}; },
          wgrad_bytes,
          shrink_any<Isa>,
          expand_any<Isa>,
          wgrad_any<Isa>,
          shrink_few<Isa>,
          expand_few<Isa>,
          dropout_bits<Isa>};
}
