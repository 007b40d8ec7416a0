// The functions of fused_gemm.h in vector code, for the instruction set of the including file.
// Included after simd_passes.h, inside an anonymous namespace per file.
#pragma once

// panel[d][c] = float(Q(d, c)), [depth, 64]. Columns that Q does not have are multiplied, too, and
// never stored: zeros, so that the sums are not slow with what was in memory.
template <class Isa>
void pack_float_panel(const MatrixView& q, Range depth, Range cols, float* panel) {
  const int64_t rows = depth.end - depth.begin, width = cols.end - cols.begin;
  if (width < kPanelCols) std::fill_n(panel, rows * kPanelCols, 0.0f);
  with_dtype(q.dtype, [&](auto type) {
    const auto* in =
        element<decltype(type)>(q.data, depth.begin * q.depth_pitch + cols.begin * q.col_pitch);
    pack_rows<Isa>(in, q.depth_pitch, q.col_pitch, rows, width, panel, kPanelCols);
  });
}

// panel[d / 2][c][d % 2] = Q(d, c), [depth / 2, 64, 2]. Columns whose elements are contiguous are
// transposed two elements at a time, as floats that nothing computes with.
template <class Isa>
void pack_bfloat16_panel(const MatrixView& q, Range depth, Range cols, BFloat16* panel) {
  const int64_t rows = depth.end - depth.begin, width = cols.end - cols.begin;
  const int64_t padded = round_up(rows, 2);
  if (width < kPanelCols || padded != rows) {
    std::fill_n(panel, padded * kPanelCols, BFloat16{0});
  }
  const auto* in =
      element<BFloat16>(q.data, depth.begin * q.depth_pitch + cols.begin * q.col_pitch);
  int64_t d = 0;
  if (q.depth_pitch == 1 && q.col_pitch % 2 == 0) {
    d = rows / 2 * 2;
    transpose_rows<Isa>(reinterpret_cast<const float*>(in), q.col_pitch / 2, width, rows / 2,
                        reinterpret_cast<float*>(panel), kPanelCols);
  } else if (q.col_pitch == 1) {
    for (; d + 2 <= rows; d += 2) {
      const BFloat16 *even = in + d * q.depth_pitch, *odd = even + q.depth_pitch;
      BFloat16* out = panel + d * kPanelCols;
      for (int64_t c = 0; c < width; ++c) out[2 * c] = even[c], out[2 * c + 1] = odd[c];
    }
  }
  for (; d < rows; ++d) {
    BFloat16* out = panel + d / 2 * 2 * kPanelCols + d % 2;
    for (int64_t c = 0; c < width; ++c) out[2 * c] = in[d * q.depth_pitch + c * q.col_pitch];
  }
}

template <class Isa>
void convert_any(const void* p, Dtype dtype, int64_t pitch, int64_t rows, int64_t depth, float* out,
                 int64_t out_pitch) {
  with_dtype(dtype, [&](auto type) {
    convert_rows<Isa>(element<decltype(type)>(p, 0), pitch, rows, depth, out, out_pitch);
  });
}

template <class Isa, class T>
void store_tile(const TileArgs& args, const float* sums, Range rows, Range cols) {
  constexpr int64_t kLanes = Isa::kLanes, kBitsPitch = kPanelCols / 32;
  alignas(64) float low_rank[kPanelCols * kPanelCols];
  uint32_t bits[kPanelCols * kBitsPitch];
  const int64_t num_rows = rows.end - rows.begin, width = cols.end - cols.begin;
  const bool drop = args.dropout.enabled();
  if (args.t != nullptr) {
    const int64_t lanes = round_up(width, kLanes);
    std::fill_n(low_rank, num_rows * kPanelCols, 0.0f);
    multiply_block<Isa>(num_rows, lanes, args.rank, args.t + rows.begin * args.rank, args.rank, 1,
                        static_cast<const float*>(args.u) + cols.begin,
                        expand_pitch<Isa>(args.cols), low_rank, kPanelCols);
    if (drop) dropout_bits<Isa>(args.dropout, RowIndex{}, rows, cols, bits, kBitsPitch);
  }
  const T* bias = args.bias == nullptr ? nullptr : element<T>(args.bias, cols.begin);
  const auto factor = Isa::broadcast(args.scale);
  const int64_t whole = width / kLanes * kLanes;
  for (int64_t m = 0; m < num_rows; ++m) {
    T* out = static_cast<T*>(args.y) + (rows.begin + m) * args.y_pitch + cols.begin;
    const float *sum = sums + m * kPanelCols, *low = low_rank + m * kPanelCols;
    const uint32_t* keep = bits + m * kBitsPitch;
    for (int64_t c = 0; c < whole; c += kLanes) {
      auto value = Isa::load(sum + c);
      if (bias != nullptr) value = Isa::add(value, Isa::load(bias + c));
      if (args.t != nullptr) {
        auto delta = Isa::multiply(Isa::load(low + c), factor);
        if (drop) delta = Isa::keep(delta, keep[c / 32] >> (c % 32));
        value = Isa::add(value, delta);
      }
      Isa::store(out + c, value);
    }
    for (int64_t c = whole; c < width; ++c) {
      float value = sum[c];
      if (bias != nullptr) value += to_float(bias[c]);
      if (args.t != nullptr) {
        const float delta = low[c] * args.scale;  // rounded before the add, as in the vectors
        const bool kept = !drop || (keep[c / 32] >> (c % 32) & 1u) != 0;
        value += kept ? delta : 0.0f;
      }
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
  return {skinny, pack_float_panel<Isa>, pack_bfloat16_panel<Isa>, convert_any<Isa>,
          store_tile_any<Isa>};
}
