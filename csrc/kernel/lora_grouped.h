// lora_grouped: many LoRA adapters in one batch. Each row of X takes one adapter g, or none:
//
//     Y = X W^T + bias + s_g (drop(X) A_g^T) B_g^T          dS = s_g dY B_g
//     dX = dY W + mask * (dS A_g)      dA_g = dS^T drop(X)      dB_g = s_g dY^T S      over g's
//     rows
//
// The host knows neither which rows are whose nor the adapters' ranks, only how many there may be:
// grids and workspace follow from that, and lora_grouped_segments.h makes the tables below on the
// device. Rows are taken in the order of their adapters, each at a "position"; those without an
// adapter come last, or, where ranges of rows are given, stay where they are.
#pragma once

#include <cstdint>

namespace lora_ext::kernel {

// Who takes which adapter: either an index for each row, or the ends of ranges of rows. An index
// that names no adapter, as -1 does, and one that names an adapter of rank 0 mean none.
struct LoraGroupedRows {
  const int* index;  // [m], or null
  const int* ends;   // [groups], where there is no index; clamped to ascend and to end at m
  int m, groups;
  int most_rank;  // larger ranks count as this, negative ones as 0
};

// One adapter's matrices, A [rank, k] and B [n, rank], rows a pitch apart.
struct LoraGroupedEntry {
  void *a, *b;
  int64_t a_pitch, b_pitch;  // elements
  int rank;
};

// Those of all adapters, or their gradients: a table, or a pool in which they lie a stride apart.
struct LoraGroupedFactors {
  const LoraGroupedEntry* entries;  // [groups], or null
  void *a, *b;                      // of a pool: [groups, most_rank, k] and [groups, n, most_rank]
  int64_t a_stride, b_stride, a_pitch, b_pitch;  // elements
  const int* ranks;                              // [groups]
};

// Positions of one adapter of some rank that has rows. One more, past the last, begins nowhere.
struct LoraGroupedSegment {
  int adapter, begin, end, rank;
  int steps;  // of 64 along the ranks of all segments before
};

// Positions of one adapter that one block takes; of none, the block has nothing to do.
struct LoraGroupedPiece {
  int adapter, begin, count;
  int slot;  // of its partial sum, where its segment has other pieces; else -1
};

// How the sum over an adapter's rows is made: `pieces` partial sums from `slot` on, or, of one
// piece, at once. Without rows there is none.
struct LoraGroupedSum {
  int pieces, slot;
};

// On the device, written by lora_grouped_segments.h.
struct LoraGroupedTables {
  static constexpr int kTileRows = 64;      // of `tiles`, which are pieces
  static constexpr int kRowTileRows = 128;  // of lora_gemm's tiles, which straddle segments

  int* order;                    // [m], the row at each position; null where that is the position
  LoraGroupedSegment* segments;  // [groups + 1]
  int* first;                    // [row tiles + 1], the first segment that ends past its beginning
  LoraGroupedPiece* tiles;       // [tile_count]
  LoraGroupedPiece* pieces;      // [piece_count], for sums over rows
  LoraGroupedSum* sums;          // [groups]
  int* counts;                   // [chunks, groups + 1], where an index is given
  int piece_rows, tile_count, piece_count;

  // What the host knows of them. Pieces never straddle segments.
  static constexpr int tiles_of(int m, int groups, int rows) {
    return (m + rows - 1) / rows + (groups < m ? groups : m);
  }
  // Partial sums of segments with more than one piece: `count` rows, more than `rows`, make at most
  // 2 (count / rows) pieces.
  static constexpr int slots_of(int m, int rows) { return 2 * (m / rows); }
};

}  // namespace lora_ext::kernel
