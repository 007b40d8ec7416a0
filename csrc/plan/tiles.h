// The tiles that lora_gemm and lora_decode are compiled for, and which of them a card and a call
// can have.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "plan/problem.h"

namespace lora_ext::plan {

// Of kernel/lora_gemm_sm80.h, of lora_gemm_sm90a/in_grid.h and kernel.h, and, for few rows,
// kernel/lora_decode.h.
enum class Tile {
  k128x128,
  kDeep128x128,
  k128x64,
  kInGrid128x256,
  kWgmma128x256,
  kPingpong128x192,
  kDecode,
};

// The tiles of kernel/lora_gemm.h, which are the same (kernel/lora_linear_sequence.h and
// lora_gemm_sm90a/launch.h assert it): rows, columns, shared memory in bytes, resident blocks an SM
// at most (by registers). What their main loops reach of the tensor rate is in main_loop_rates.h.
struct TileFacts {
  Tile tile;
  const char* name;
  int64_t rows, columns, shared;
  int resident;
  bool wgmma;    // on compute capability 9.0 alone, in pairs of blocks one below the other
  bool in_grid;  // makes T, too, where fits_in_grid allows it
};
constexpr TileFacts kTiles[] = {
    {Tile::k128x128, "128 x 128", 128, 128, 74752, 2, false, false},
    {Tile::kDeep128x128, "deep 128 x 128", 128, 128, 101376, 1, false, false},
    {Tile::k128x64, "128 x 64", 128, 64, 78848, 3, false, false},
    {Tile::kInGrid128x256, "in-grid 128 x 256", 128, 256, 231528, 1, true, true},
    {Tile::kWgmma128x256, "wgmma 128 x 256", 128, 256, 231488, 1, true, false},
    {Tile::kPingpong128x192, "pingpong 128 x 192", 128, 192, 198720, 1, true, false},
    // Its instances are kDecodeTiles; this is the largest.
    {Tile::kDecode, "decode", 64, 128, 100652, 1, false, false},
};
constexpr const TileFacts& facts_of(Tile tile) { return kTiles[static_cast<int>(tile)]; }

// lora_decode's instances for up to `batch` rows of X, which kernel/lora_decode_launch.h asserts:
// rows of W in a tile, bytes of shared memory, and blocks on an SM that registers leave room for.
struct DecodeTile {
  int64_t batch, rows, shared, resident;
};
constexpr DecodeTile kDecodeTiles[] = {
    {8, 64, 46396, 2}, {16, 64, 51804, 2}, {32, 128, 83116, 1}, {64, 128, 100652, 1}};
constexpr int64_t kMostDecodeRows = 64;
static_assert(facts_of(Tile::kDecode).shared == kDecodeTiles[3].shared);
constexpr const DecodeTile& decode_tile_for(int64_t m) {
  const DecodeTile* tile = kDecodeTiles;
  while (tile->batch < m) ++tile;
  return *tile;
}
// Times 16 ranks of B whose loads are in flight together, as kernel/lora_decode_low_rank.h has
// them.
constexpr int64_t decode_pieces(const DecodeTile& tile, bool float_adapters) {
  return !float_adapters ? 4 : tile.batch < 64 ? 2 : 1;
}

// The 16s along k that the last 64 of the rank need: one, or all four. Two and three are made in
// four, which costs a tile two products at most and saves a third of the kernels; and so is one on
// dX whose T is made in its grid: lora_dsdb makes T of so few columns, but where B is frozen.
constexpr int tail_of(int rank, bool in_grid_dx = false) {
  return (rank - 1) % 64 < 16 && !in_grid_dx ? 1 : 4;
}

std::optional<Tile> tile_named(const std::string& name);

// Whether there is a kernel of many adapters with a tile. A wgmma cannot keep one adapter's sums
// from the rows of another; and where two blocks of 128 x 128 fit on an SM, the library's base
// product is always faster than one that waits for each adapter's rows.
constexpr bool has_grouped_kernel(Tile tile) {
  return tile == Tile::kDeep128x128 || tile == Tile::k128x64 || tile == Tile::kDecode;
}

// A call, as far as it decides which tiles can compute it.
struct Call {
  bool backward, float_adapters, dropout;
};
inline Call call_of(const Problem& p) { return {p.backward, p.float_adapters, p.dropout}; }
// T in the grid of the product is of one half and of one step of T U; and not of dropped X, which a
// tensor core cannot take from shared memory as it came.
inline bool fits_in_grid(const Call& call) {
  return !call.float_adapters && (call.backward || !call.dropout);
}
// Whether a card has a tile for a call, of some rank; and all that it has.
bool fits(const TileFacts& tile, const Card& card, const Call& call);
std::vector<Tile> tiles_of(const Card& card, const Call& call);

// Two blocks of 128 x 128 with two stages, on an SM.
inline bool two_blocks_fit(const Card& card) {
  return card.shared_per_sm >= 2 * (facts_of(Tile::k128x128).shared + 1024);
}

}  // namespace lora_ext::plan
