// The planner: which kernels compute a LoRA linear on a GPU, how they are split, and where their
// intermediates are in one workspace. Without torch or CUDA; equal inputs give equal plans.
//
//     problem.h             inputs: card, problem; the tiles that kernels have
//     plan.cpp              the plan that is asked for, or the one with the least predicted time
//         kernels.cpp       1. which kernels, and why
//         tile_choice.cpp   2. their tiles, splits and blocks
//         workspace.cpp     3. where their intermediates are
//         predict.cpp       4. how long they should take
//     autotune_cache.cpp    measurements, which have priority over a prediction
#pragma once

#include <algorithm>
#include <limits>
#include <optional>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "kernels/plan/problem.h"

namespace lora_ext::plan {

// kHybrid: base products by the library, all else by the kernels.
enum class Choice { kAuto, kKernel, kHybrid, kLibrary };

// Of the user or of a measurement.
struct Request {
  Choice choice = Choice::kAuto;
  std::optional<Tile> tile{};  // for kKernel
  std::string measured{};      // end of "fastest as measured ..."; "" if the user asks
  bool use_pdl = true;         // PDL: a kernel may start before the one before it ends
  int max_blocks = std::numeric_limits<int>::max();  // of lora_gemm; fewer have more tiles each
};

struct Gemm {
  Tile tile;
  int blocks;    // persistent; of wgmma, as many as may be resident
  bool use_pdl;  // starts before the kernel that writes T has ended; wgmma only
  int max_blocks = std::numeric_limits<int>::max();  // by the request, and for wgmma by the card
};

// Parts of a sum along the last dimension of a grid, of so many steps of 64 each.
struct Splits {
  int splits = 0, steps_per_split = 0;
};

constexpr int64_t kNone = -1;  // an offset of what is not in the workspace

// Who computes X W^T or dY W: lora_gemm; the library, onto lora_gemm's low-rank product; or none.
enum class Base { kKernel, kLibrary, kGiven };

// Of the tables of kernels/lora_grouped.h; kernels/sequence/grouped_params.h asserts them.
constexpr int64_t kGroupedTileRows = 64, kGroupedRowTileRows = 128, kGroupedChunk = 256;
constexpr int64_t kGroupedEntryBytes = 40, kGroupedSegmentBytes = 20, kGroupedPieceBytes = 16,
                  kGroupedSumBytes = 8, kGroupedEntries = 96;  // of a launch that writes them

// Tables of many adapters.
struct Tables {
  // Upper bounds: of pieces of `rows` rows, which never span segments; of partial sums of segments
  // with several pieces: one with `count` rows, more than `rows`, has at most 2 (count / rows).
  static constexpr int64_t pieces_of(int64_t m, int64_t groups, int64_t rows) {
    return (m + rows - 1) / rows + std::min(groups, m);
  }
  static constexpr int64_t slots_of(int64_t m, int64_t rows) { return 2 * (m / rows); }
  int piece_rows;  // rows of one partial sum of the gradients
  int tile_count, row_tile_count, piece_count, slots;
  int64_t entries = kNone, gradient_entries = kNone, order = kNone;  // byte offsets
  int64_t counts = kNone, ranks = kNone, segments = kNone, first = kNone;
  int64_t tiles = kNone, row_tiles = kNone, pieces = kNone, sums = kNone;
  bool own_weights() const { return row_tiles != kNone; }
};
// Those of experts' rows, which depend on nothing else: on neither a projection nor a direction.
struct ExpertsTables {
  Tables tables{};
  int64_t bytes;
};
ExpertsTables experts_tables(int64_t m, int64_t experts);

// The skinny kernels and lora_gemm: sequence/linear_sequence.h and sequence/grouped_sequence.h.
struct Tiled {
  Base base = Base::kKernel;
  int terms = 1;       // of a factor: hi, or hi and lo
  int width = 0;       // the rank in whole chunks: number of columns of S, dS and B
  int columns = 0;     // terms * width
  bool vector = true;  // rows are whole chunks of 16 bytes
  bool weight_row_major = true;

  std::optional<Gemm> gemm{};  // Y, or dX
  std::string no_wgmma{};      // on compute capability 9.0: why gemm does not use wgmma
  int z_columns = 0;           // of the partial sums of S or dS
  Splits shrink{};             // of k, or of n
  // Backward only.
  int panels = 0;  // if not 0, lora_dsdb computes dS and dB, with this number of sums of dS
  Splits dlora_b{}, dlora_a{};
  bool wgrad_uses_pdl = false;  // lora_wgrad starts beside the last tiles of dX
  // Byte offsets. Halves: A [terms * rank, a_pitch], B [n, columns], T, which is s S or dS, [m,
  // columns], s S [m, columns], and with own weights dS with the weights of rows [m, columns].
  // Partial sums, in float32: of S or dS, of dA, of dB.
  int64_t a = kNone, b = kNone, t = kNone, s = kNone, weighted_t = kNone, a_pitch = 0;
  int64_t z = kNone, g_a = kNone, g_b = kNone;
  std::optional<Tables> tables{};  // with many adapters

  bool one_pass() const { return panels > 0; }
  int t_sums() const { return one_pass() ? panels : shrink.splits; }
  // lora_wgrad computes a product: that of dA, or that of dB if lora_dsdb does not.
  bool has_wgrad() const { return dlora_a.splits > 0 || db_apart(); }
  bool db_apart() const { return dlora_b.splits > 0 && !one_pass(); }
};

// lora_decode: a forward of few rows in one launch.
struct Decode {
  int batch, blocks;        // most rows; of the grid
  int terms;                // of a factor: hi, or hi and lo
  int width;                // columns of T's hi, and of its lo
  int64_t tiles, s_tiles;   // of Y, and of S at most
  int64_t sums, s_sums, t;  // byte offsets: partial sums of Y, and of S; T, in halves
  int64_t flags;            // arrival counts
  int64_t entries = kNone;  // table of a list of adapters
  int64_t flag_count() const { return tiles + s_tiles + 1; }
};

struct Library {};
struct Plan {
  std::string reason;
  std::variant<Library, Tiled, Decode> sequence{};
  int64_t workspace = 0;                                       // bytes
  std::vector<std::pair<std::string, double>> predicted_us{};  // of each route that was compared
  Card card{};                                                 // for which it was made
  Problem problem{};
  bool has_kernels() const { return !std::holds_alternative<Library>(sequence); }
  const Tiled* tiled() const { return std::get_if<Tiled>(&sequence); }
  const Decode* decode() const { return std::get_if<Decode>(&sequence); }
  bool hybrid() const { return tiled() != nullptr && tiled()->base != Base::kKernel; }
  bool library_base() const { return tiled() != nullptr && tiled()->base == Base::kLibrary; }
  std::string describe() const;  // with its launches, and what each is predicted to take
};

Plan make_plan(const Card& card, const Problem& problem, const Request& request);

}  // namespace lora_ext::plan
