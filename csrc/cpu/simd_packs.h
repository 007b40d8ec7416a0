// Packs factors for the passes of simd_passes.h: in float, lanes padded with zeros.
//
// Included after `#pragma GCC target`, inside an anonymous namespace per file. A factor is
// contiguous along one of its dimensions; if the panel needs the other one, blocks of kLanes x
// kLanes are transposed in registers. Packing 16 x 2048 bfloat16 by single elements took as long as
// the pass of 12 rows that reads it.
#pragma once

template <class T>
const T* element(const void* base, int64_t index) {
  return static_cast<const T*>(base) + index;
}

// out[i][j] = float(in[i][j]) for `rows` rows of `width` elements, with zeros up to whole lanes.
template <class Isa, class T>
void convert_rows(const T* in, int64_t in_pitch, int64_t rows, int64_t width, float* out,
                  int64_t out_pitch) {
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < width; j += Isa::kLanes) {
      Isa::store(out + i * out_pitch + j, Isa::load_first(in + i * in_pitch + j, width - j));
    }
  }
}

// block[j] = float(in[i][j]) at i for the first `rows` rows and `width` columns, and zeros.
template <class Isa, class T>
[[gnu::always_inline]] inline void load_block(const T* in, int64_t pitch, int64_t rows,
                                              int64_t width,
                                              typename Isa::Vec (&block)[Isa::kLanes]) {
  if (rows >= Isa::kLanes && width >= Isa::kLanes) return Isa::load_transposed(in, pitch, block);
  for (int64_t i = 0; i < Isa::kLanes; ++i) {
    block[i] = i < rows ? Isa::load_first(in + i * pitch, width) : Isa::zero();
  }
  Isa::transpose(block);
}

// out[j][i] = float(in[i][j]) for at most kLanes rows of `width` elements; i is padded with zeros
// up to whole lanes.
template <class Isa, class T>
void transpose_strip(const T* in, int64_t in_pitch, int64_t rows, int64_t width, float* out,
                     int64_t out_pitch) {
  for (int64_t j = 0; j < width; j += Isa::kLanes) {
    typename Isa::Vec block[Isa::kLanes];
    load_block<Isa>(in + j, in_pitch, rows, width - j, block);
    const int64_t columns = std::min<int64_t>(Isa::kLanes, width - j);
    for (int64_t column = 0; column < columns; ++column) {
      Isa::store(out + (j + column) * out_pitch, block[column]);
    }
  }
}

// The same for any number of rows. Parts of long rows are first copied so that they are contiguous:
// 16 rows at a power-of-two pitch compete for the same lines of the first-level cache.
template <class Isa, class T>
void transpose_rows(const T* in, int64_t in_pitch, int64_t rows, int64_t width, float* out,
                    int64_t out_pitch) {
  constexpr int64_t kLanes = Isa::kLanes, kPart = 256;
  alignas(64) T part[kLanes * kPart];
  for (int64_t i = 0; i < rows; i += kLanes) {
    const int64_t strip = std::min(kLanes, rows - i);
    if (width <= kLanes) {
      transpose_strip<Isa>(in + i * in_pitch, in_pitch, strip, width, out + i, out_pitch);
      continue;
    }
    for (int64_t j = 0; j < width; j += kPart) {
      const int64_t columns = std::min(kPart, width - j);
      for (int64_t row = 0; row < strip; ++row) {
        std::copy_n(in + (i + row) * in_pitch + j, columns, part + row * kPart);
      }
      transpose_strip<Isa>(part, kPart, strip, columns, out + j * out_pitch + i, out_pitch);
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

// Pitch of the panel of expand, in floats. One cache line more than the columns: at a power of two,
// all rows of a block would compete for the same lines of the first-level cache.
template <class Isa>
int64_t expand_pitch(int64_t cols) {
  constexpr int64_t kCacheLine = 16;
  return round_up(cols, Isa::kLanes) + kCacheLine;
}

template <class Isa>
int64_t expand_panel_bytes(int64_t rank, int64_t cols) {
  return rank * expand_pitch<Isa>(cols) * static_cast<int64_t>(sizeof(float));
}

// panel[j][c] = float(adapter(j, c)), zero for c >= cols up to whole lanes: [rank, pitch]
template <class Isa>
void pack_expand(const AdapterView& adapter, void* panel) {
  with_dtype(adapter.dtype, [&](auto type) {
    pack_rows<Isa>(element<decltype(type)>(adapter.data, 0), adapter.rank_pitch, adapter.col_pitch,
                   adapter.rank, adapter.cols, static_cast<float*>(panel),
                   expand_pitch<Isa>(adapter.cols));
  });
}
