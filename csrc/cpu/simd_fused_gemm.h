// The functions of fused_gemm.h in vector code, for the instruction set of the including file.
// Included after simd_passes.h, inside an anonymous namespace per file.
#pragma once

// The rows of a panel are far apart, and no hardware prefetches the next page: 16 rows of 2048 x
// 1536 took 1.5 ms, with this 1.0.
template <class T>
void prefetch_later_row(const T* row, int64_t pitch, int64_t width) {
  constexpr int64_t kRowsAhead = 16, kLine = 64;
  const auto address =
      reinterpret_cast<uintptr_t>(row) + static_cast<uintptr_t>(kRowsAhead * pitch) * sizeof(T);
  const auto bytes = static_cast<uintptr_t>(width) * sizeof(T);
  for (uintptr_t byte = 0; byte < bytes; byte += kLine) {
    __builtin_prefetch(reinterpret_cast<const void*>(address + byte));
  }
}

// panel[d][c] = float(Q(d, c)), [depth, 64]. Columns that Q does not have are multiplied, too, and
// never stored: zeros, so that the sums are not slow with what was in memory.
template <class Isa>
void pack_float_panel(const MatrixView& q, Range depth, Range cols, float* panel) {
  const int64_t rows = depth.end - depth.begin, width = cols.end - cols.begin;
  if (width < kPanelCols) std::fill_n(panel, rows * kPanelCols, 0.0f);
  with_dtype(q.dtype, [&](auto type) {
    const auto* in =
        element<decltype(type)>(q.data, depth.begin * q.depth_pitch + cols.begin * q.col_pitch);
    if (q.col_pitch != 1) {
      return pack_rows<Isa>(in, q.depth_pitch, q.col_pitch, rows, width, panel, kPanelCols);
    }
    for (int64_t d = 0; d < rows; ++d, in += q.depth_pitch) {
      prefetch_later_row(in, q.depth_pitch, width);
      convert_rows<Isa>(in, q.depth_pitch, 1, width, panel + d * kPanelCols, kPanelCols);
    }
  });
}

template <class Isa>
void convert_any(const void* p, Dtype dtype, int64_t pitch, RowIndex index, Range rows,
                 int64_t depth, float* out, int64_t out_pitch) {
  with_dtype(dtype, [&](auto type) {
    for (int64_t row = rows.begin; row < rows.end; ++row, out += out_pitch) {
      convert_rows<Isa>(element<decltype(type)>(p, index[row] * pitch), pitch, 1, depth, out,
                        out_pitch);
    }
  });
}

template <class Isa>
void low_rank_tile(const RowUpdate& update, int64_t first_row, int64_t rows, int64_t width,
                   const void* u, float* out) {
  const int64_t lanes = round_up(width, Isa::kLanes);
  for (int64_t i = 0; i < rows; ++i) std::fill_n(out + i * kPanelCols, lanes, 0.0f);
  const int64_t rank = update.u.rank;
  const float* t = update.t + (first_row - update.rows.begin) * rank;
  multiply_block<Isa>(rows, lanes, rank, t, rank, 1, static_cast<const float*>(u),
                      expand_pitch<Isa>(width), out, kPanelCols);
  const auto factor = Isa::broadcast(update.scale);
  for (int64_t i = 0; i < rows; ++i) {
    float* row = out + i * kPanelCols;
    for (int64_t c = 0; c < lanes; c += Isa::kLanes) {
      Isa::store(row + c, Isa::multiply(Isa::load(row + c), factor));
    }
  }
}

template <class Isa, class T>
void store_tile(const TileArgs& args, const float* sums, Range rows, Range cols) {
  constexpr int64_t kLanes = Isa::kLanes, kBitsPitch = kPanelCols / 32;
  uint32_t bits[kPanelCols * kBitsPitch];
  const int64_t num_rows = rows.end - rows.begin, width = cols.end - cols.begin;
  const bool has_low_rank = args.low_rank != nullptr, drop = has_low_rank && args.dropout.enabled();
  if (drop) dropout_bits<Isa>(args.dropout, args.rows, rows, cols, bits, kBitsPitch);
  const T* bias = args.bias == nullptr ? nullptr : element<T>(args.bias, cols.begin);
  const int64_t whole = width / kLanes * kLanes;
  for (int64_t m = 0; m < num_rows; ++m) {
    T* out = static_cast<T*>(args.y) + args.rows[rows.begin + m] * args.y_pitch + cols.begin;
    const float *sum = sums + m * kPanelCols,
                *delta = has_low_rank ? args.low_rank + m * kPanelCols : nullptr;
    const uint32_t* keep = bits + m * kBitsPitch;
    for (int64_t c = 0; c < whole; c += kLanes) {
      auto value = Isa::load(sum + c);
      if (bias != nullptr) value = Isa::add(value, Isa::load(bias + c));
      if (has_low_rank) {
        auto added = Isa::load(delta + c);
        if (drop) added = Isa::keep(added, keep[c / 32] >> (c % 32));
        value = Isa::add(value, added);
      }
      Isa::store(out + c, value);
    }
    for (int64_t c = whole; c < width; ++c) {
      float value = sum[c];
      if (bias != nullptr) value += to_float(bias[c]);
      const bool kept = !drop || (keep[c / 32] >> (c % 32) & 1u) != 0;
      if (has_low_rank) value += kept ? delta[c] : 0.0f;
      from_float(value, &out[c]);
    }
  }
}

template <class Isa>
void store_tile_any(const TileArgs& args, const float* sums, Range rows, Range cols) {
  with_dtype(args.dtype,
             [&](auto type) { store_tile<Isa, decltype(type)>(args, sums, rows, cols); });
}

template <class Isa>
constexpr FusedGemmKernels make_fused_gemm(const SkinnyKernels* skinny) {
  return {skinny, pack_float_panel<Isa>, convert_any<Isa>, low_rank_tile<Isa>, store_tile_any<Isa>};
}
