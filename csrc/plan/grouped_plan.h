// The planner for many adapters in one batch (kernel/lora_grouped.h): as plan.h, from what the host
// knows, which is how many rows and adapters there are and their largest rank, but neither whose a
// row is nor what rank an adapter has.
#pragma once
#include "plan/plan.h"

namespace lora_ext::plan {

// Sizes of the tables of kernel/lora_grouped.h, which kernel/lora_grouped_params.h asserts.
constexpr int64_t kGroupedTileRows = 64, kGroupedRowTileRows = 128, kGroupedChunk = 256;
constexpr int64_t kGroupedEntryBytes = 40, kGroupedSegmentBytes = 20, kGroupedPieceBytes = 16,
                  kGroupedSumBytes = 8;

// Whether there is a kernel of many adapters with a tile. A wgmma cannot keep one adapter's sums
// from the rows of another; and where two blocks of 128 x 128 fit on an SM, the library's base
// product is always faster than one that waits for each adapter's rows.
constexpr bool has_grouped_kernel(Tile tile) {
  return tile == Tile::kDeep128x128 || tile == Tile::k128x64 || tile == Tile::kDecode;
}

struct GroupedProblem {
  Problem one;  // with one adapter of the largest rank; of the adapters, alignment is not asked for
  int64_t groups;
  bool indexed = false;  // an index for each row; else ends of ranges
  bool listed = false;   // adapters lie in a list; else in a pool

  auto operator<=>(const GroupedProblem&) const = default;
};

struct GroupedPlan {
  // Route and reason, tiles, splits, the workspace and in it z, t, s, g_a and g_b, as if there was
  // one adapter.
  Plan one;
  int piece_rows = 0;  // of a partial sum of the gradients
  int tile_count = 0, piece_count = 0, slots = 0;
  // Byte offsets of the tables.
  int64_t entries = kNone, gradient_entries = kNone, order = kNone, counts = kNone;
  int64_t segments = kNone, first = kNone, tiles = kNone, pieces = kNone, sums = kNone;

  std::string describe() const;
};

GroupedPlan grouped_forward(const Card& card, const GroupedProblem& problem,
                            const Request& request);
GroupedPlan grouped_backward(const Card& card, const GroupedProblem& problem,
                             const Request& request);
double predicted_us(const Card& card, const GroupedProblem& problem, const GroupedPlan& plan,
                    bool backward);

}  // namespace lora_ext::plan
