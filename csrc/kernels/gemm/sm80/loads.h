// What the steps of lora_gemm load into shared memory, kStages - 1 steps ahead of the products and
// across the end of a tile, so that a tile's first stages arrive while the tile before is stored.
//
//     parts of a tile     P Q, then each term of T U; with a mask, the terms first
#pragma once
#include <climits>
#include <type_traits>

#include "kernels/gemm/params.h"
#include "kernels/tile/copy.h"

namespace lora_ext::kernel {

// The copies of one thread for an operand of lora_gemm, step after step along k: the same chunks of
// each tile. Addresses and limits are computed where a product begins, and advance with the steps.
//
// Tiles of kRows x kColumns, one after the other along the rows of a matrix (kAlongRows) or down
// its columns. A thread's chunks are one below the other, kApart rows apart.
template <class T, int kThreads, int kRows, int kColumns, bool kAlongRows, class Rows = SameRows>
struct StepCopy {
  using Chunk = ChunkCopy<T, Alignment::kVector>;
  struct Matrix {
    const T* data;
    int64_t pitch;
    int rows, columns;
  };

  static constexpr int kOfChunk = Element<T>::kChunk;
  static constexpr int kRowChunks = kColumns / kOfChunk, kApart = kThreads / kRowChunks;
  static constexpr int kCopies = kRows / kApart;
  static_assert(kThreads % kRowChunks == 0 && kRows % kApart == 0);
  static_assert(kApart % 8 == 0,
                "chunks of one column of a panel, in which all lie swizzled alike");
  static_assert(kAlongRows || Rows::kInOrder);

  const Chunk chunk;
  const int row_in_tile = static_cast<int>(threadIdx.x) / kRowChunks;
  const int chunk_in_row = static_cast<int>(threadIdx.x) % kRowChunks;
  // Offset of the first chunk, in a tile of panels (tile/copy.h).
  const uint32_t in_tile = panel_chunk_offset<kRows>(row_in_tile, chunk_in_row);

  const T* source = nullptr;  // the first chunk of this step
  int64_t apart = 0;          // elements from one chunk to the next, or of a row, if not in order
  int rows = 0, columns = 0;  // of the matrix, from the first chunk on
  int position = 0;           // of the first chunk's row
  int row_at[Rows::kInOrder ? 1 : kCopies] = {};  // rows that are not in order

  // Begins at (first_row, first_column).
  __device__ __forceinline__ void begin(const Matrix& matrix, int first_row, int first_column,
                                        const Rows& row_of) {
    const int column = first_column + chunk_in_row * kOfChunk;
    position = first_row + row_in_tile;
    rows = matrix.rows - position, columns = matrix.columns - column;
    if constexpr (Rows::kInOrder) {
      source = matrix.data + (static_cast<int64_t>(position) * matrix.pitch + column);
      apart = kApart * matrix.pitch;
    } else {
      source = matrix.data + column, apart = matrix.pitch;
#pragma unroll
      for (int i = 0; i < kCopies; ++i) row_at[i] = row_of(position + i * kApart);
    }
  }

  // Copies the thread's i-th chunk of the step.
  __device__ __forceinline__ void copy(uint32_t tile, int i) {
    const int elements = i * kApart < rows ? min(max(columns, 0), kOfChunk) : 0;
    const uint32_t to = tile + in_tile + static_cast<uint32_t>(i * kApart) * 128;
    if constexpr (Rows::kInOrder) {
      chunk.copy(to, source + i * apart, elements);
    } else {
      chunk.copy(to, source + row_at[i] * apart, elements);
    }
  }
  __device__ __forceinline__ void copy_all(uint32_t tile) {
#pragma unroll
    for (int i = 0; i < kCopies; ++i) copy(tile, i);
  }

  __device__ __forceinline__ void advance() {
    if constexpr (kAlongRows) {
      source += kColumns, columns -= kColumns;
    } else {
      source += kCopies * apart, rows -= kRows;
    }
  }
};

// Where a tile of Y begins.
struct LoraGemmPlace {
  int row, column;
};

// Order of the tiles: one that keeps eight row blocks of P and one column block of Q in L2.
template <class Tile>
struct LoraGemmRaster {
  const int row_tiles, column_tiles;

  __device__ __forceinline__ int tiles() const { return row_tiles * column_tiles; }
  __device__ __forceinline__ LoraGemmPlace place_of(int tile) const {
    constexpr int kGroup = 8;
    const int first = tile / (kGroup * column_tiles) * kGroup;
    const int height = row_tiles - first >= kGroup ? kGroup : row_tiles - first;
    const int within = tile - first * column_tiles;
    return {(first + within % height) * Tile::kM, within / height * Tile::kN};
  }
};

// The tiles' rows: here tiles of all rows, one below the other. grouped/own_weights.h has tiles of one
// expert's rows each, and their own Q.
struct TilesOfAllRows {
  // The rows of a tile, by position.
  struct Span {
    int begin;
    template <class Params>
    __device__ __forceinline__ static int end(const Params& p) {
      return p.m;
    }
    __device__ __forceinline__ static bool is_empty() { return false; }
    __device__ __forceinline__ static bool has_products() { return true; }
  };

  template <class Params>
  __device__ __forceinline__ static int row_tiles(const Params& p, int rows) {
    return (p.m + rows - 1) / rows;
  }
  // Of the tile whose first row would be `row`; known in the loads by a cursor.
  __device__ __forceinline__ static Span span_at(int row) { return {row}; }
  template <class Cursor>
  __device__ __forceinline__ static Span span_of(const Cursor&, int row) {
    return {row};
  }
  // Steps of P Q, and Q.
  template <class Params>
  __device__ __forceinline__ static int main_steps(const Params& p, const Span&) {
    return (p.k + 63) / 64;
  }
  template <class Params>
  __device__ __forceinline__ static auto q(const Params& p, const Span&) {
    return p.q;
  }
  template <class Epilogue, class Params, class Rows>
  __device__ __forceinline__ static Epilogue epilogue(const Params& p, const Span&,
                                                      const Rows& rows) {
    return {p, rows};
  }
};

template <class T, class Tile, bool kMNMajor, bool kMasked, class Adapters>
struct LoraGemmLoads {
  using TileOf = Tile;
  using Rows = typename Adapters::Rows;
  using Left = StepCopy<T, Tile::kThreads, Tile::kM, Tile::kK, true, Rows>;
  using Right = std::conditional_t<kMNMajor, StepCopy<T, Tile::kThreads, Tile::kK, Tile::kN, false>,
                                   StepCopy<T, Tile::kThreads, Tile::kN, Tile::kK, true>>;

  const LoraGemmParams<T>& p;
  const Adapters& adapters;
  const LoraGemmRaster<Tile>& raster;
  const uint32_t shared;

  Left left{{shared}};
  Right right{{shared}};
  int tile = static_cast<int>(blockIdx.x - gridDim.x);
  int part = adapters.parts(p);
  int steps = 0;  // of the part, not yet copied
  bool low_rank = false;
  uint32_t stage = 0;  // offset of the stage to fill next
  typename Adapters::Cursor cursor{};

  // Begins the next part that has any steps. After the last tile, steps go on: past the end of the
  // operands they copy zeros into stages that are never read.
  __device__ __forceinline__ void begin_part() {
    do {
      if (part == adapters.parts(p)) {
        tile += static_cast<int>(gridDim.x), part = 0;
        if (tile >= raster.tiles()) {
          steps = INT_MAX, low_rank = false;
          return;
        }
        adapters.begin(cursor, raster.place_of(tile).row);
      } else {
        ++part;
      }
      low_rank = part != (kMasked ? adapters.parts(p) : 0);
      steps = low_rank ? adapters.steps(p, cursor) : adapters.main_steps(p, span());
    } while (steps == 0);
    low_rank ? adapters.begin_part(*this, kMasked ? part : part - 1)
             : begin_product(p.p, p.p_pitch, adapters.q(p, span()), p.q_pitch, p.k);
  }
  // The rows of the tile.
  __device__ __forceinline__ auto span() const {
    return adapters.span_of(cursor, raster.place_of(tile).row);
  }
  __device__ __forceinline__ void begin_product(const T* of_left, int64_t left_pitch,
                                                const T* of_right, int64_t right_pitch, int depth) {
    // Recomputed for each part rather than kept in registers throughout.
    const LoraGemmPlace at = raster.place_of(tile);
    const auto rows = span();
    left.begin({of_left, left_pitch, rows.end(p), depth}, rows.begin, 0, adapters.rows);
    if constexpr (kMNMajor) {
      right.begin({of_right, right_pitch, depth, p.n}, 0, at.column, {});
    } else {
      right.begin({of_right, right_pitch, p.n, depth}, at.column, 0, {});
    }
  }
  // Issues all copies of a step.
  __device__ __forceinline__ void step() {
    if (steps == 0) begin_part();
    adapters.copy_step(*this);
  }
  __device__ __forceinline__ void copy_step() {
    left.copy_all(stage);
    right.copy_all(stage + Tile::kLeftBytes);
    left.advance(), right.advance();
    --steps;
  }
};

}  // namespace lora_ext::kernel
