// lora_grouped: many LoRA adapters in one batch. Each row of X takes one adapter g, or none:
//
//     Y    = X W^T + bias + s_g (drop(X) A_g^T) B_g^T
//     dS   = s_g dY B_g
//     dX   = dY W + mask * (dS A_g)
//     dA_g = dS^T drop(X)              over the rows of g
//     dB_g = s_g dY^T S                over the rows of g
//
// Plain C++ without device code, as lora_linear.h, which has the function that launches a plan:
// what the kernels' tables hold, and the operands as raw pointers.
//
// The host knows neither the adapter of a row nor the ranks of the adapters, only the largest
// possible numbers: grids and workspace follow from those, and grouped/segments.h makes the
// tables below on the device. Rows are processed in the order of their adapters, each at a
// "position"; rows without an adapter come last, or, where ranges of rows are given, stay in place.
//
// With own weights (plan::Groups) the groups are the experts of a mixture: each has its own W and
// bias, too. Where rows have adapters of their own, a group is an expert with one of them, and
// neighbouring groups share a W. Positions are ranges of rows by `ends`, in which a group may have
// none; tables say where each operand has the row of a position. Positions past the last group's
// belong to no expert: Y and dX have zeros there.
#pragma once
#include <cstdint>
#include <type_traits>

#include "kernels/lora_linear.h"
#include "kernels/plan/plan.h"

namespace lora_ext::kernel {

// The map from rows to adapters: either an index per row, or the ends of ranges of rows. An index
// that names no adapter, as -1 does, and one that names an adapter of rank 0 mean none.
struct LoraGroupedRows {
  const int* index;  // [m], or null
  const int* ends;   // [groups], used without an index; clamped to ascend and to end at m
  int m, groups;
  int max_rank;  // larger ranks count as this, negative ones as 0
};

// One adapter's matrices, A [rank, k] and B [n, rank], with the pitch of their rows.
struct LoraGroupedEntry {
  void *a, *b;
  int64_t a_pitch, b_pitch;  // elements
  int rank;
};

// The matrices of all adapters, or their gradients: a table, or a pool with a fixed stride.
struct LoraGroupedFactors {
  const LoraGroupedEntry* entries;  // [groups], or null
  void *a, *b;                      // of a pool: [groups, max_rank, k] and [groups, n, max_rank]
  int64_t a_stride, b_stride, a_pitch, b_pitch;  // elements
  const int* ranks;  // [groups]; a pool without them has the largest rank everywhere
  // Elements from a rank of B to the next. Not 1 only in gradients with own weights: in PEFT's
  // layout [n, rank, groups] of dB b_stride is 1, b_pitch rank * groups and b_step groups.
  int64_t b_step = 1;
};

// Where each operand has the row of a position: tables [m], or null for the position itself. They are
// filled for positions of no expert, too. `y` is of Y and S; of dX in a backward.
struct LoraGroupedPlaces {
  const int *x, *dy, *y, *mask;
};

// Weights of rows, in floats or in X's type, or null for 1.
struct LoraGroupedWeights {
  const void* of;  // [m]
  bool in_float;
  const int* slots;  // [m], which is a position's; null: its own number
};

// A segment: the positions of one adapter that has rows and a rank. The last segment is followed by
// an entry that begins at INT_MAX.
struct LoraGroupedSegment {
  int adapter, begin, end, rank;
  int steps;  // of 64 along the rank, of all segments before
};

// A piece: positions of one adapter that one block processes; it may be empty.
struct LoraGroupedPiece {
  int adapter, begin, count;
  // Of its partial sum, if its segment has several pieces, else -1; of row_tiles the W's number.
  int slot;
};

// How the sum over an adapter's rows is computed: from `pieces` partial sums, the first in `slot`,
// or, if there is one piece, directly. Without rows there is no piece.
struct LoraGroupedSum {
  int pieces, slot;
};

// Tables on the device, written by grouped/segments.h.
struct LoraGroupedTables {
  static constexpr int kTileRows = 64;      // rows of `tiles`, which are pieces
  static constexpr int kRowTileRows = 128;  // rows of lora_gemm's tiles, which may span segments

  int* order;                    // [m], the row at each position; null where that is the position
  LoraGroupedSegment* segments;  // [groups + 1]
  int* first;                    // [row tiles + 1], the first segment that ends past its beginning
  LoraGroupedPiece* tiles;       // [tile_count]
  LoraGroupedPiece* row_tiles;   // [row_tile_count], of kRowTileRows; null but with own weights.
                                 // The last have adapter -1: positions without an expert
  LoraGroupedPiece* pieces;      // [piece_count], for sums over rows
  LoraGroupedSum* sums;          // [groups]
  int* counts;                   // [groups + 1, chunks], used with an index
  int* ranks;                    // [groups], of a pool; null for a list
  int piece_rows, tile_count, row_tile_count, piece_count;
};
inline LoraGroupedTables tables_at(const plan::Tables& tables, unsigned char* begin) {
  const auto at = [&](auto*& table, int64_t offset) {
    if (offset != plan::kNone)
      table = reinterpret_cast<std::remove_reference_t<decltype(table)>>(begin + offset);
  };
  LoraGroupedTables found{};
  at(found.order, tables.order), at(found.first, tables.first);
  at(found.segments, tables.segments), at(found.tiles, tables.tiles);
  at(found.row_tiles, tables.row_tiles), at(found.pieces, tables.pieces);
  at(found.sums, tables.sums), at(found.counts, tables.counts), at(found.ranks, tables.ranks);
  found.piece_rows = tables.piece_rows, found.tile_count = tables.tile_count;
  found.row_tile_count = tables.row_tile_count, found.piece_count = tables.piece_count;
  return found;
}

// The operands follow. Their values on the device may change between replays of a graph: index or
// ends, ranks, scalings, and adapters within their pool.

// All factors, or all gradients of factors, in floats or in X's type: a pool, or a list that the
// host has. A gradient has the layout of its factor.
struct LoraGroupedMatrices {
  LoraGroupedFactors pool;       // its entries are null; a gradient's ranks are not read
  const LoraGroupedEntry* list;  // [groups], on the host; null for a pool
};

struct LoraGroupedOperands : LoraOperands {
  LoraGroupedRows rows;
  const float* scaling;  // [groups], on the device; null: one_scaling for all
  float one_scaling;
  LoraGroupedMatrices factors;

  // With own weights the factors are a pool without ranks, in X's type and in whole chunks of 16
  // bytes: A [groups, plan.columns, k] and B [groups, n, plan.columns], whose hi has plan.width ranks
  // and is followed by lo if float_adapters. Their gradients are in float then, of max_rank ranks.
  // Elements from one W, [n, k] or as the plan says [k, n], to the next, and of the bias.
  int64_t weight_stride;
  int64_t bias_stride;
  LoraGroupedPlaces places;
  // The W there are, by number; the others' rows of Y and dX are left as they are. A launch whose
  // first is not 0 goes on with one for those before, in its workspace: it writes Y or dX alone.
  int first_weight, end_weight;
  // Those of plan::experts_tables, or null, and they are made in the workspace. Beside them a forward
  // may have T, [m, plan.columns], so that Y alone is left.
  unsigned char* tables;
  const void* t;
  int groups_per_weight = 1;  // group g has W g / groups_per_weight, and its bias
  bool goes_on() const { return first_weight > 0; }
};
struct LoraGroupedForward : LoraGroupedOperands, ForwardOperands {};
struct LoraGroupedBackward : LoraGroupedOperands, BackwardOperands {
  // All elements are written; in a pool those past a rank with zeros.
  LoraGroupedMatrices gradients;
  bool need_da, need_db;
  // With own weights: the gradient of a row is so many times dY's. dA and dB have it so, dX is
  // without.
  LoraGroupedWeights row_weights;
};

}  // namespace lora_ext::kernel
