// The steps of a plan, in order (plan.h names their files), and the arithmetic that they share.
#pragma once
#include <cstdint>
#include <vector>

#include "kernels/plan/decode_shares.h"
#include "kernels/plan/plan.h"

namespace lora_ext::plan {

constexpr int64_t kStep = 64;  // depth of one step of all main loops
constexpr int kFloat = 4;      // bytes

inline int64_t blocks_of(int64_t count, int64_t size) { return (count + size - 1) / size; }
inline int64_t rounded_up(int64_t count, int64_t size) { return blocks_of(count, size) * size; }
inline double area(int64_t rows, int64_t columns) {
  return static_cast<double>(rows) * static_cast<double>(columns);
}
// Bytes of a number of x's dtype, in which also the weight, y and T are stored.
inline double element_bytes(const Problem& p) { return static_cast<double>(element_size(p.dtype)); }

// Number of blocks that have a tile of Y or dX; with wgmma in pairs along the rows, but for experts.
inline int64_t tiles_of_product(const TileFacts& tile, const Problem& p) {
  const int64_t together = tile.wgmma && !p.own_weights() ? 2 : 1;
  return together * p.row_tiles(together * tile.rows) * blocks_of(p.columns(), tile.columns);
}

// Sets the reason, and the sequence of kernels, if any.
Plan choose_kernels(const Card& card, const Problem& problem, const Request& request);
// The tiles that are compared for it: the requested one, if the card and the call can have it.
std::vector<Tile> tiles_for(const Plan& plan, const Request& request);
// Sets the numbers of a table's entries with its piece_rows.
void count_pieces(Tables& tables, int64_t m, int64_t groups);
// Rows of a partial sum of experts' gradients: the expert with most rows may have nearly all.
inline int64_t experts_piece_rows(int64_t m) {
  return std::max(4 * kStep, rounded_up(blocks_of(m, 16), kStep));
}
// Sets its splits and blocks with the request's tile.
void choose_tiles(Plan& plan, const Request& request);
// Sets the offsets of intermediates in the workspace, and its size.
void place_in_workspace(Plan& plan);

}  // namespace lora_ext::plan
