// The planner: which kernels compute a LoRA linear on a GPU, how they are split, and where in one
// workspace their intermediates lie. Pure host code without torch or CUDA; equal inputs give equal
// plans.
//
//     problem (shape, dtypes, alignment, card)  ->  plan (route and reason, tiles, splits, offsets)
#pragma once

#include <compare>
#include <cstdint>
#include <limits>
#include <optional>
#include <string>
#include <vector>

namespace lora_ext::plan {

// What a card gives to kernels. `arch` is 10 major + minor.
struct Card {
  int arch;
  int sms;
  int64_t shared_per_sm, shared_per_block;  // bytes; a block can have at most the second
  std::string name{};       // the driver's, by which measurements are kept; "" in the abstract
  bool tensor_maps = true;  // the driver encodes them, which TMA needs
  bool sm90a_code = true;   // this build has some
  std::string error{};      // why the CUDA runtime cannot use the card; "" if it can
};

// Which route is asked for; kAuto leaves it to the planner. kHybrid: base products by the library,
// everything else by the kernels.
enum class Choice { kAuto, kKernel, kHybrid, kLibrary };

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

// The 16s along k that the last 64 of the rank need: one, or all four. Two and three are made in
// four, which costs a tile two products at most and saves a third of the kernels; and so is one on
// dX whose T is made in its grid: lora_dsdb makes T of so few columns, but where B is frozen.
constexpr int tail_of(int rank, bool in_grid_dx = false) {
  return (rank - 1) % 64 < 16 && !in_grid_dx ? 1 : 4;
}

// A route, and for kKernel perhaps a tile, asked for by the user or by a measurement (winners.h).
struct Request {
  Choice choice = Choice::kAuto;
  std::optional<Tile> tile{};
  std::string measured{};    // where: the end of "fastest as measured ..."; "" if the user asks
  bool early_launch = true;  // a kernel may begin before the one before it ends, where it can wait
  int most_blocks = std::numeric_limits<int>::max();  // of lora_gemm; fewer have more tiles each
};

// A LoRA linear's operands. "aligned": unit stride in a row, and pointer and row pitch are
// multiples of 16 bytes.
struct Problem {
  int64_t m, n, k, rank;
  bool half_dtype = true;       // x's: bfloat16 or half; others stay on the library route
  bool float_adapters = false;  // else of x's dtype
  bool dropout = false;
  bool given_base = false;       // y is there: there is no weight, and no base product
  bool weight_row_major = true;  // [n, k] with unit stride along k
  bool aligned = true;           // x and y (forward); dY, x and dX (backward)
  bool aligned_weight = true;
  bool aligned_a = true, aligned_b = true;
  bool factor_rows = true;  // A and B have unit stride along a row
  bool need_dx = true, need_dlora_a = true, need_dlora_b = true;  // backward only

  auto operator<=>(const Problem&) const = default;
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
  bool in_grid;  // makes T, too, where fits_in_grid of plan.cpp allows it
};
constexpr TileFacts kTiles[] = {
    {Tile::k128x128, "128 x 128", 128, 128, 74752, 2, false, false},
    {Tile::kDeep128x128, "deep 128 x 128", 128, 128, 101376, 1, false, false},
    {Tile::k128x64, "128 x 64", 128, 64, 78848, 3, false, false},
    {Tile::kInGrid128x256, "in-grid 128 x 256", 128, 256, 231528, 1, true, true},
    {Tile::kWgmma128x256, "wgmma 128 x 256", 128, 256, 231488, 1, true, false},
    {Tile::kPingpong128x192, "pingpong 128 x 192", 128, 192, 198720, 1, true, false},
    // Its instances are decode_plan.h's; this is the largest.
    {Tile::kDecode, "decode", 64, 128, 100652, 1, false, false},
};
constexpr const TileFacts& facts_of(Tile tile) { return kTiles[static_cast<int>(tile)]; }

std::optional<Tile> tile_named(const std::string& name);
// A call, as far as it decides which tiles can compute it.
struct Call {
  bool backward, float_adapters, dropout;
};
// Those that a card has for a call, of some rank.
std::vector<Tile> tiles_of(const Card& card, const Call& call);

struct Gemm {
  Tile tile;
  bool vector;  // rows of Y are whole chunks of 16 bytes
  int blocks;   // persistent; of wgmma, as many as may be resident
  bool early;   // begins before the kernel that writes T has ended, and waits for it; wgmma's alone
  int most_blocks = std::numeric_limits<int>::max();  // by the request, and of wgmma by the card
};

// A grid's last dimension: `splits` shares of a sum, each of steps_per_split steps of 64.
struct Splits {
  int splits = 0, steps_per_split = 0;
};

// Microseconds of each route, where the planner compared them; 0 of what it left out.
struct Predicted {
  double library = 0, hybrid = 0, kernel = 0;
  std::string describe() const;
};

constexpr int64_t kNone = -1;        // an offset of what is not in the workspace
constexpr int64_t kFlagsApart = 32;  // of 4 bytes: flags that different blocks write, by 128 bytes

struct Plan {
  bool kernel = false;      // else the library route
  bool hybrid = false;      // the base by the library, onto the low-rank product by lora_gemm
  bool given_base = false;  // and it is no X W^T or dY W, but a given y
  std::string reason;
  int terms = 1;          // hi alone, or hi and lo
  int width = 0;          // the rank in whole chunks: columns of each of S, dS, B
  int columns = 0;        // terms * width
  bool vector = true;     // of skinny kernels
  int64_t workspace = 0;  // bytes

  Gemm gemm{};  // Y, or dX
  // Byte offsets of halves: A [terms * rank, a_pitch], B [n, columns], and T, which is S or dS,
  // [m, columns].
  int64_t a = kNone, b = kNone, t = kNone;
  int64_t a_pitch = 0;
  // Partial sums of S or dS.
  int64_t z = kNone;
  int64_t flags = kNone;  // in_grid: uint32, ticket, written, ready, kFlagsApart apart
  int z_columns = 0;
  Splits shrink{};  // of k, or of n

  // Backward only.
  bool one_pass = false;  // lora_dsdb makes dS and dB
  int panels = 0;         // its partial sums of dS
  int64_t s = kNone;      // halves of s S, [m, columns]
  Splits dlora_b{}, dlora_a{};
  int64_t g_b = kNone, g_a = kNone;  // partial sums of gradients

  int64_t row_blocks = 0;    // in_grid: of T, each with a flag
  int pairs_per_ticket = 1;  // of row blocks, whose part of T one cluster makes at a time
  bool early_wgrad = false;  // lora_wgrad begins beside the last tiles of dX
  std::string no_wgmma;      // on compute capability 9.0: why gemm has none

  // Of lora_decode, which is gemm and makes S, too; t and z are its T and its partial sums of Y.
  struct Decode {
    int batch = 0;                   // up to so many rows; 0 in other plans
    int width = 0;                   // of T's hi, and of its lo
    int64_t tiles = 0, s_tiles = 0;  // of Y, and of S at most
    int64_t s_sums = kNone;          // partial sums of S
  };
  Decode decode{};
  Predicted predicted{};

  bool in_grid() const;                                        // gemm makes T, too
  bool library_base() const { return hybrid && !given_base; }  // X W^T or dY W, onto gemm's
  int64_t flag_count() const {
    return is_decode() ? decode.tiles + decode.s_tiles + 1 : 2 * kFlagsApart + row_blocks;
  }
  bool is_decode() const { return decode.batch > 0; }
  // lora_wgrad makes a product: that of dA, or that of dB where lora_dsdb does not.
  bool has_wgrad() const { return dlora_a.splits > 0 || db_apart(); }
  bool db_apart() const { return dlora_b.splits > 0 && !one_pass; }
  std::string describe() const;
};

Plan forward(const Card& card, const Problem& problem, const Request& request);
Plan backward(const Card& card, const Problem& problem, const Request& request);

}  // namespace lora_ext::plan
