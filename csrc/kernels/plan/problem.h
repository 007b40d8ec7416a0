// Inputs of the planner: the card, the operands of the LoRA linear, and the tiles that lora_gemm
// and lora_decode are compiled for.
#pragma once
#include <algorithm>
#include <compare>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "common/dtype.h"

namespace lora_ext::plan {

struct Card {
  int arch, sms;                            // compute capability: 10 major + minor
  int64_t shared_per_sm, shared_per_block;  // bytes; the second is the limit of a block
  std::string name{};       // the driver's, the key of measurements; "" for an abstract card
  bool tensor_maps = true;  // the driver encodes them, which TMA needs
  bool sm90a_code = true;   // this build has sm_90a code
  std::string error{};      // why the CUDA runtime cannot use the card; "" if it can
};

// Many adapters in one batch. The host knows neither the adapter of a row nor its rank.
struct Groups {
  int64_t count;
  bool indexed = false;  // an index per row; else ends of ranges
  bool listed = false;   // adapters are a list of tensors; else slots of a pool
  // Experts: each group has its own W; with ends of ranges and a pool.
  bool own_weights = false;
  auto operator<=>(const Groups&) const = default;
};

// The operands of a LoRA linear. "aligned": unit stride along a row, and pointer and row pitch are
// multiples of 16 bytes.
struct Problem {
  int64_t m, n, k, rank;           // the largest rank, if there are groups
  Dtype dtype = Dtype::kBFloat16;  // of x and y; of two, that which holds both
  bool float_adapters = false;     // else of x's dtype
  bool dropout = false;
  bool given_base = false;       // y is given: there is no weight, and no base product
  bool weight_row_major = true;  // [n, k] with unit stride along k
  bool aligned = true;           // x and y (forward); dY, x and dX (backward)
  bool aligned_weight = true;
  bool aligned_a = true, aligned_b = true;  // without groups
  bool factor_rows = true;                  // A and B have unit stride along a row
  bool backward = false;
  bool need_dx = true, need_dlora_a = true, need_dlora_b = true;  // backward only
  std::optional<Groups> groups{};                                 // else one adapter for all rows
  auto operator<=>(const Problem&) const = default;

  bool half_dtype() const { return is_half(dtype); }  // others stay on the library route
  // lora_gemm computes Y [m, n] of depth k, or dX [m, k] of depth n.
  bool has_product() const { return !backward || need_dx; }
  int64_t columns() const { return backward ? k : n; }
  int64_t depth() const { return backward ? n : k; }
  bool masked_product() const { return backward && dropout; }
  bool need_ds() const { return backward && (need_dx || need_dlora_a); }
  // The largest number of adapters that rows can have.
  int64_t adapters() const { return groups ? std::min(groups->count, m) : 1; }
  bool own_weights() const { return groups && groups->own_weights; }
  // Whether kernels can compute X W^T or dY W: they copy whole chunks of 16 bytes, but with own
  // weights any.
  bool kernels_can_make_base() const {
    return own_weights() || (!given_base && weight_row_major && aligned && aligned_weight);
  }
  // Tiles of so many rows that Y has; of experts each has its own, and all as many rows.
  int64_t row_tiles(int64_t rows) const {
    const int64_t experts = own_weights() ? std::max<int64_t>(1, adapters()) : 1;
    const int64_t each = (m + experts - 1) / experts;
    return experts * ((each + rows - 1) / rows);
  }
};

// Of kernels/gemm/sm80/kernel.h, gemm/sm90a/kernel.h and decode/work.h.
enum class Tile {
  k128x128,
  kDeep128x128,
  k128x64,
  kWgmma128x256,
  kPingpong128x192,
  kDecode,
};

// As in kernels/gemm/params.h (kernels/sequence/linear_sequence.h and gemm/sm90a/launch.h assert
// it): rows, columns, shared memory in bytes, most resident blocks per SM (by registers). `share`:
// of the library's rate with the same instruction, what a tile is assumed to reach to its end.
struct TileFacts {
  Tile tile;
  const char* name;
  int64_t rows, columns, shared;
  int resident;
  bool wgmma;  // only on compute capability 9.0; in pairs of blocks along the rows, but for experts
  double share;
};
constexpr TileFacts kTiles[] = {
    {Tile::k128x128, "128 x 128", 128, 128, 74752, 2, false, 0.94},
    {Tile::kDeep128x128, "deep 128 x 128", 128, 128, 101376, 1, false, 0.96},
    {Tile::k128x64, "128 x 64", 128, 64, 78848, 3, false, 0.7},
    {Tile::kWgmma128x256, "wgmma 128 x 256", 128, 256, 231488, 1, true, 0.98},
    {Tile::kPingpong128x192, "pingpong 128 x 192", 128, 192, 198720, 1, true, 0.92},
    // Its instances are kDecodeTiles; this is the largest one.
    {Tile::kDecode, "decode", 64, 128, 100652, 1, false, 0.0},
};
constexpr const TileFacts& facts_of(Tile tile) { return kTiles[static_cast<int>(tile)]; }

// lora_decode's instances for up to `batch` rows of X, as kernels/decode/launch.h asserts: rows of W
// in a tile, bytes of shared memory, and blocks per SM that registers allow.
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
// Pieces of B, of 16 ranks, whose loads are in flight at once, as in kernels/decode/low_rank.h.
constexpr int64_t decode_pieces(const DecodeTile& tile, bool float_adapters) {
  return !float_adapters ? 4 : tile.batch < 64 ? 2 : 1;
}

// Number of k16 steps for the last 64 columns of the rank: 1, or else 4, which costs a tile at most
// two products and saves kernels.
constexpr int tail_of(int rank) { return (rank - 1) % 64 < 16 ? 1 : 4; }

std::optional<Tile> tile_named(const std::string& name);

// For many adapters: a wgmma cannot keep one adapter's sums out of the rows of another; and if two
// blocks of 128 x 128 fit on an SM, the library's base product is always faster, where it has one.
constexpr bool has_grouped_kernel(Tile tile) {
  return tile == Tile::kDeep128x128 || tile == Tile::k128x64 || tile == Tile::kDecode;
}
// For experts: the larger tiles have registers for whole chunks of a W that is row-major, and on
// compute capability 9.0 not for these.
inline bool has_experts_kernel(Tile tile, const Card& card, bool vector, bool transposed) {
  if (tile == Tile::k128x64) return true;
  if (tile == Tile::kWgmma128x256) return vector;  // where why_no_wgmma allows it
  const bool large = tile == Tile::kDeep128x128 || tile == Tile::k128x128;
  return large && vector && !transposed && card.arch != 90;
}

// The properties of a call that decide which tiles can compute it.
struct Call {
  bool backward, float_adapters, dropout;
};
inline Call call_of(const Problem& p) { return {p.backward, p.float_adapters, p.dropout}; }
// Whether a card has a tile for a call, for any rank; and all tiles that it has.
bool fits(const TileFacts& tile, const Card& card, const Call& call);
std::vector<Tile> tiles_of(const Card& card, const Call& call);

}  // namespace lora_ext::plan
