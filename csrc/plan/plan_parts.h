// What the planners of one adapter and of many share.
#pragma once
#include "plan/plan.h"

namespace lora_ext::plan {

inline int64_t blocks_of(int64_t count, int64_t size) { return (count + size - 1) / size; }
inline double area(int64_t rows, int64_t columns) {
  return static_cast<double>(rows) * static_cast<double>(columns);
}
inline int64_t rounded_up(int64_t count, int64_t size) { return blocks_of(count, size) * size; }

struct Workspace {
  static constexpr int64_t kAlignBytes = 256;
  int64_t bytes = 0;
  int64_t take(int64_t elements, int64_t size) {
    const int64_t offset = bytes;
    bytes += rounded_up(elements * size, kAlignBytes);
    return offset;
  }
};

// The route, or why it is the library's, and the widths of S and dS.
Plan begin_plan(const Card& card, const Problem& p, const Request& request);
// Enough splits for two blocks on every SM, but none so short that its copies do not get going.
Splits choose_splits(const Card& card, int64_t blocks, int64_t length);

// Whether our kernels can make X W^T or dY W: they copy whole chunks of 16 bytes.
inline bool may_make_base(const Problem& p) {
  return !p.given_base && p.weight_row_major && p.aligned && p.aligned_weight;
}

// Of the tile of 128 x 128 with two stages, on an SM.
inline bool two_blocks_fit(const Card& card) {
  return card.shared_per_sm >= 2 * (facts_of(Tile::k128x128).shared + 1024);
}

// Blocks that have work; wgmma's come in pairs of rows.
int64_t blocks_with_work(const TileFacts& tile, int64_t m, int64_t n);
Gemm with_tile(const Card& card, const TileFacts& tile, int64_t m, int64_t n, bool vector);
void limit_blocks(Gemm& gemm, const Request& request);

}  // namespace lora_ext::plan
