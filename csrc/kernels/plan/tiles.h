// The tiles that lora_gemm and lora_decode are compiled for, and which of them a card and a call
// can have.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "kernels/plan/problem.h"

namespace lora_ext::plan {

// Tiles of kernels/gemm/sm80/kernel.h, of gemm/sm90a/fused_shrink.h and kernel.h, and, for few
// rows, of kernels/decode/work.h.
enum class Tile {
  k128x128,
  kDeep128x128,
  k128x64,
  kFusedShrink128x256,
  kWgmma128x256,
  kPingpong128x192,
  kDecode,
};

// The tiles of kernels/gemm/params.h, to which these are equal (kernels/sequence/linear_sequence.h
// and gemm/sm90a/launch.h assert it): rows, columns, shared memory in bytes, most resident blocks
// per SM (by registers). rates.h has the fraction of the tensor rate that their main loops reach.
struct TileFacts {
  Tile tile;
  const char* name;
  int64_t rows, columns, shared;
  int resident;
  bool wgmma;         // only on compute capability 9.0, in pairs of blocks along the rows
  bool fused_shrink;  // can also compute T, if fits_fused_shrink allows it
};
constexpr TileFacts kTiles[] = {
    {Tile::k128x128, "128 x 128", 128, 128, 74752, 2, false, false},
    {Tile::kDeep128x128, "deep 128 x 128", 128, 128, 101376, 1, false, false},
    {Tile::k128x64, "128 x 64", 128, 64, 78848, 3, false, false},
    {Tile::kFusedShrink128x256, "fused-shrink 128 x 256", 128, 256, 231528, 1, true, true},
    {Tile::kWgmma128x256, "wgmma 128 x 256", 128, 256, 231488, 1, true, false},
    {Tile::kPingpong128x192, "pingpong 128 x 192", 128, 192, 198720, 1, true, false},
    // Its instances are kDecodeTiles; this is the largest one.
    {Tile::kDecode, "decode", 64, 128, 100652, 1, false, false},
};
constexpr const TileFacts& facts_of(Tile tile) { return kTiles[static_cast<int>(tile)]; }

// lora_decode's instances for up to `batch` rows of X, which kernels/decode/launch.h asserts:
// rows of W in a tile, bytes of shared memory, and blocks per SM that registers allow.
struct DecodeTile {
  int64_t batch, rows, shared, resident;
};
constexpr DecodeTile kDecodeTiles[] = {
    {8, 64, 46396, 2}, {16, 64, 51804, 2}, {32, 128, 83116, 1}, {64, 128, 100652, 1}};
constexpr int64_t kMaxDecodeRows = 64;
static_assert(facts_of(Tile::kDecode).shared == kDecodeTiles[3].shared);
constexpr const DecodeTile& decode_tile_for(int64_t m) {
  const DecodeTile* tile = kDecodeTiles;
  while (tile->batch < m) ++tile;
  return *tile;
}
// Number of 16-rank pieces of B whose loads are in flight at once, as in
// kernels/decode/low_rank.h.
constexpr int64_t decode_pieces(const DecodeTile& tile, bool float_adapters) {
  return !float_adapters ? 4 : tile.batch < 64 ? 2 : 1;
}

// Number of k16 steps for the last 64 columns of the rank: 1 if at most 16 columns remain, else 4.
// Two and three steps are computed as 4, which costs a tile at most two products and saves a third
// of the kernels. A dX whose T is computed in its grid always has 4: with so few columns lora_dsdb
// computes T, unless B is frozen.
constexpr int tail_of(int rank, bool fused_shrink_dx = false) {
  return (rank - 1) % 64 < 16 && !fused_shrink_dx ? 1 : 4;
}

std::optional<Tile> tile_named(const std::string& name);

// Whether there is a kernel for many adapters with a tile. A wgmma cannot keep one adapter's sums
// out of the rows of another; and if two blocks of 128 x 128 fit on an SM, the library's base
// product is always faster than one that waits for each adapter's rows.
constexpr bool has_grouped_kernel(Tile tile) {
  return tile == Tile::kDeep128x128 || tile == Tile::k128x64 || tile == Tile::kDecode;
}

// The properties of a call that decide which tiles can compute it.
struct Call {
  bool backward, float_adapters, dropout;
};
inline Call call_of(const Problem& p) { return {p.backward, p.float_adapters, p.dropout}; }
// T can be computed in the grid of the product if it has one term and one step of T U; and not for
// dropped X, since wgmma reads X from shared memory as loaded, without the mask.
inline bool fits_fused_shrink(const Call& call) {
  return !call.float_adapters && (call.backward || !call.dropout);
}
// Whether a card has a tile for a call, for any rank; and all tiles that it has.
bool fits(const TileFacts& tile, const Card& card, const Call& call);
std::vector<Tile> tiles_of(const Card& card, const Call& call);

// Whether two blocks of 128 x 128 with two stages fit on an SM.
inline bool two_blocks_fit(const Card& card) {
  return card.shared_per_sm >= 2 * (facts_of(Tile::k128x128).shared + 1024);
}

}  // namespace lora_ext::plan
