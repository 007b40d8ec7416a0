// Factors as the passes of simd_passes.h read them: in float, lanes padded with zeros.
//
// Included after `#pragma GCC target`, inside an anonymous namespace per file. A factor lies along
// one of its dimensions; the panel may want the other, and then blocks of kLanes x kLanes are
// transposed in registers. Packing 16 x 2048 bfloat16 by single elements took as long as the pass
// of 12 rows that reads it.
#pragma once

template <class T>
const T* element(const void* base, int64_t index) {
  return static_cast<const T*>(base) + index;
}

// The first `count` <= kLanes elements, and zeros.
template <class Isa, class T>
typename Isa::Vec load_first(const T* in, int64_t count) {
  if (count >= Isa::kLanes) return Isa::load(in);
  alignas(64) float values[Isa::kLanes] = {};
  for (int64_t i = 0; i < count; ++i) values[i] = to_float(in[i]);
  return Isa::load(values);
}

// out[i][j] = float(in[i][j]) for `rows` rows of `width` elements, with zeros up to whole lanes.
template <class Isa, class T>
void convert_rows(const T* in, int64_t in_pitch, int64_t rows, int64_t width, float* out,
                  int64_t out_pitch) {
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < width; j += Isa::kLanes) {
      Isa::store(out + i * out_pitch + j, load_first<Isa>(in + i * in_pitch + j, width - j));
    }
  }
}

// out[j][i] = float(in[i][j]) for `rows` rows of `width` elements; i is padded with zeros up to
// whole lanes.
template <class Isa, class T>
void transpose_rows(const T* in, int64_t in_pitch, int64_t rows, int64_t width, float* out,
                    int64_t out_pitch) {
  constexpr int64_t kLanes = Isa::kLanes;
  for (int64_t i = 0; i < rows; i += kLanes) {
    for (int64_t j = 0; j < width; j += kLanes) {
      typename Isa::Vec block[kLanes];
      for (int64_t row = 0; row < kLanes; ++row) {
        block[row] = i + row < rows ? load_first<Isa>(in + (i + row) * in_pitch + j, width - j)
                                    : Isa::zero();
      }
      Isa::transpose(block);
      const int64_t columns = std::min(kLanes, width - j);
      for (int64_t column = 0; column < columns; ++column) {
        Isa::store(out + (j + column) * out_pitch + i, block[column]);
      }
    }
  }
}

// out[i][j] = float(in[i * row_pitch + j * col_pitch]), padded with zeros in j up to whole lanes.
template <class Isa, class T>
void pack_rows(const T* in, int64_t row_pitch, int64_t col_pitch, int64_t rows, int64_t cols,
               float* out, int64_t out_pitch) {
  if (col_pitch == 1) return convert_rows<Isa>(in, row_pitch, rows, cols, out, out_pitch);
  if (row_pitch == 1) return transpose_rows<Isa>(in, col_pitch, cols, rows, out, out_pitch);
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < cols; ++j) {
      out[i * out_pitch + j] = to_float(in[i * row_pitch + j * col_pitch]);
    }
    for (int64_t j = cols; j < round_up(cols, Isa::kLanes); ++j) out[i * out_pitch + j] = 0.0f;
  }
}

template <class Isa>
int64_t shrink_panel_bytes(int64_t rank, int64_t cols) {
  return cols * round_up(rank, Isa::kLanes) * static_cast<int64_t>(sizeof(float));
}

// panel[c][j] = float(adapter(j, c)), zero for j >= rank: [cols, rank_pad]
template <class Isa>
void pack_shrink(const AdapterView& adapter, void* panel) {
  with_dtype(adapter.dtype, [&](auto type) {
    pack_rows<Isa>(element<decltype(type)>(adapter.data, 0), adapter.col_pitch, adapter.rank_pitch,
                   adapter.cols, adapter.rank, static_cast<float*>(panel),
                   round_up(adapter.rank, Isa::kLanes));
  });
}

template <class Isa>
int64_t expand_panel_bytes(int64_t rank, int64_t cols) {
  return rank * round_up(cols, Isa::kLanes) * static_cast<int64_t>(sizeof(float));
}

// panel[j][c] = float(adapter(j, c)), zero for c >= cols: [rank, cols_pad]
template <class Isa>
void pack_expand(const AdapterView& adapter, void* panel) {
  with_dtype(adapter.dtype, [&](auto type) {
    pack_rows<Isa>(element<decltype(type)>(adapter.data, 0), adapter.rank_pitch, adapter.col_pitch,
                   adapter.rank, adapter.cols, static_cast<float*>(panel),
                   round_up(adapter.cols, Isa::kLanes));
  });
}
