#include "plan/plan_prediction.h"

#include <algorithm>
#include <iterator>

#include "common/bounds.h"
#include "plan/decode_plan.h"
#include "plan/main_loop_rates.h"
#include "plan/plan_parts.h"

namespace lora_ext::plan {
namespace {

constexpr double kHalf = 2, kFloat = 4;  // bytes

// Vendors' dense rates times 0.8 and bandwidths times 0.9, of a card of each generation. Others of
// the generation are taken to have as much for each SM. `mma_share`: the rate of mma.sync over that
// of the library, which has faster instructions for its products on 9.0 (arXiv:2501.12084 measured
// 494 of 757 TFLOP/s) and 10.x.
struct Generation {
  int arch, sms;
  double tflops, dram_gb_s, mma_share;
};
constexpr Generation kGenerations[] = {
    {80, 108, 250, 1830, 1.0},     // A100
    {86, 72, 100, 540, 1.0},       // A10
    {89, 142, 290, 780, 1.0},      // L40S
    {90, 132, 790, 3000, 0.65},    // H100 SXM
    {100, 148, 1800, 7000, 0.25},  // B200
    {120, 170, 170, 1600, 1.0},    // RTX 5090
};

// The last that is not newer than the card.
const Generation& generation_of(const Card& card) {
  const Generation* found = &kGenerations[0];
  for (const Generation& each : kGenerations)
    if (each.arch <= card.arch) found = &each;
  return *found;
}

// What the library chooses among, the smaller tiles at a lower rate.
struct LibraryTile {
  int64_t rows, columns;
  double share;
};
constexpr LibraryTile kLibraryTiles[] = {
    {128, 256, 1.0}, {128, 128, 0.9}, {128, 64, 0.75}, {64, 64, 0.55}};
constexpr int64_t kLibrarySplit = 512;  // the least depth of a split of k

// What a tile takes beside its products, in columns of k that its main loop could have made
// meanwhile. By the instructions counted in the machine code, wgmma's take 1.2 % of a depth of 4096
// (docs/kernels.md), and applying a mask, whose bits are drawn among products, 0.9 %; none of the
// epilogue where another warpgroup multiplies. On mma.sync estimated, and bits are drawn outside.
struct TileEnd {
  int64_t epilogue, mask;
};
constexpr TileEnd kEndOnMma{128, 192}, kEndOnWgmma{64, 64};
// A draw for eight elements of a low-rank product alone, some 80 instructions of which an SM issues
// 128 a clock, in operations that mma.sync makes on an H100's SM meanwhile, for each element.
constexpr double kDrawFlop = 150;
// A job that makes T of a pair of row blocks, over a pair of tiles of 128 x 256: it fills stages of
// a third of the bytes, each in about that share of the time that a tile multiplies one.
constexpr double kJobTiles = 0.3;
// The share of a card's bandwidth that a share of its SMs can draw, over that share.
constexpr double kShareOfDram = 2.5;

double mma_share(const Card& card) { return generation_of(card).mma_share; }

// Waves of tiles, or of pairs of tiles on pairs of SMs; and how full the last one is.
struct Waves {
  int64_t whole, workers, tiles;
  int64_t idle() const { return whole * workers - tiles; }
};
Waves waves_of(const Card& card, const TileFacts& tile, int64_t m, int64_t n) {
  const int64_t together = tile.wgmma ? 2 : 1;
  const int64_t workers = std::max<int64_t>(1, card.sms / together);
  const int64_t tiles = blocks_of(m, together * tile.rows) * blocks_of(n, tile.columns);
  return {blocks_of(tiles, workers), workers, tiles};
}

// A call's sizes as its formulas have them: Y [m, n] and its depth k, or dX [m, k] and n.
struct Product {
  int64_t m, n, k;
};

// 10.x, whose mma.sync was not counted, as 9.0; others by what fits into their shared memory.
const MainLoopRates& main_loops_of(const Card& card) {
  if (card.arch >= 90 && card.arch < 120) return kMainLoopsOnH100;
  return two_blocks_fit(card) ? kMainLoopsOnA100 : kMainLoopsOnL40S;
}

// Of the library's rate, by a loop on mma.sync.
double share_on_mma(const Card& card, double of_tensor_rate) {
  return of_tensor_rate / main_loops_of(card).library * mma_share(card);
}

// Passes over m x k or m x n elements in our kernels of few columns, which come in 64s.
Launch skinny(const Card& card, const char* name, double bytes, double elements, int columns,
              double of_tensor_rate, double draws = 0.0) {
  const double flop = 2.0 * 64 * static_cast<double>(blocks_of(columns, 64));
  return {name, bytes, elements * (flop + draws) / share_on_mma(card, of_tensor_rate)};
}
double rate_of(const MainLoopRate& rate, bool masked) { return masked ? rate.masked : rate.plain; }

// Three products of halves are one of floats: hi hi, hi lo, lo hi.
int64_t rank_terms(const Problem& p) { return p.float_adapters ? 3 : 1; }

double tile_flop(const Card& card, const TileFacts& tile, int64_t k, bool masked) {
  const bool overlapped = tile.tile == Tile::kPingpong128x192;
  const TileEnd& end = tile.wgmma ? kEndOnWgmma : kEndOnMma;
  const int64_t depth = k + (overlapped ? 0 : end.epilogue) + (masked ? end.mask : 0);
  const double share = main_loop_share(card, tile, masked);
  return 2.0 * area(tile.rows, tile.columns) * static_cast<double>(depth) / share;
}

// Tiles' time for which all wait until T is made, unless clusters without a last tile make it.
double wait_for_t(const Plan& plan, const Waves& waves, bool masked) {
  if (!plan.in_grid()) return 0.0;
  const double job = kJobTiles * plan.pairs_per_ticket;
  const int64_t tickets = blocks_of(plan.row_blocks / 2, plan.pairs_per_ticket);
  if (!masked && tickets <= waves.idle()) return 0.0;
  return job * static_cast<double>(blocks_of(tickets, waves.workers));
}

Launch lora_gemm(const Card& card, const Problem& p, const Plan& plan, const Product& s,
                 bool masked) {
  const double low_rank = kHalf * static_cast<double>(rank_terms(p)) * area(p.rank, s.m + s.n);
  if (plan.hybrid) {
    const double bytes = kHalf * area(s.m, s.n) + low_rank;
    const MainLoopRate& rate = main_loops_of(card).tiles[static_cast<int>(Tile::k128x64)];
    return skinny(card, "lora_gemm", bytes, area(s.m, s.n), plan.columns, rate.plain,
                  masked ? kDrawFlop : 0.0);
  }
  const TileFacts& tile = facts_of(plan.gemm.tile);
  const int64_t depth = s.k + rank_terms(p) * 16 * blocks_of(p.rank, 16);
  const Waves waves = waves_of(card, tile, s.m, s.n);
  double bytes = kHalf * (area(s.m, s.k) + area(s.n, s.k) + area(s.m, s.n)) + low_rank;
  if (plan.in_grid()) bytes += kHalf * area(p.rank, s.k + s.m);
  const double wave = tile_flop(card, tile, depth, masked) * card.sms;
  const double all = static_cast<double>(waves.whole) + wait_for_t(plan, waves, masked);
  return {"lora_gemm", bytes, wave * all};
}

// What is left of lora_wgrad after the last wave of dX, beside which it begins: on the SMs that
// have no tile in it, and from the end of the first main loops on, since all of a grid must begin
// before a dependent may.
Launch after_dx(const Card& card, const Launch& wgrad, const Launch& dx, const Plan& plan,
                const Problem& p) {
  const Waves waves = waves_of(card, facts_of(plan.gemm.tile), p.m, p.k);
  if (waves.whole < 2) return wgrad;
  const Sustained rates = sustained_by(card);
  const double idle = static_cast<double>(waves.idle()) / static_cast<double>(waves.workers);
  const double wave_flop = dx.flop / static_cast<double>(waves.whole);
  const double wave_us = wave_flop / (rates.tflops * 1e6);
  const double dx_gb_s = dx.bytes / (wave_us * static_cast<double>(waves.whole)) / 1e3;
  const double gb_s = std::max(0.0, rates.dram_gb_s - dx_gb_s) * std::min(1.0, kShareOfDram * idle);
  const double by_bytes = gb_s * 1e3 * wave_us / wgrad.bytes;
  const double by_flop = wave_flop * idle / wgrad.flop;
  const double left = std::max(0.0, 1.0 - std::min(by_bytes, by_flop));
  return {wgrad.name, left * wgrad.bytes, left * wgrad.flop};
}

// csrc/library/library_route.cpp with adapters of x's dtype: the expand first, the base product
// onto it.
Launches library_forward(const Card& card, const Problem& p) {
  Launches launches;
  if (p.dropout) launches.add("dropout", 2 * kHalf * area(p.m, p.k));
  launches.add(library_product(card, "x A^T", p.m, p.rank, p.k));
  launches.add("S to float32", (kHalf + kFloat) * area(p.m, p.rank));
  launches.add(library_product(card, "S B^T", p.m, p.n, p.rank, p.given_base));
  if (!p.given_base) launches.add(library_product(card, "base", p.m, p.n, p.k, true));
  return launches;
}

// With float32 adapters: passes in float32 over X and over Y, a block of rows at a time.
class WidePasses {
 public:
  WidePasses(const Problem& p, Launches& launches)
      : launches_(launches),
        blocks_(blocks_of(p.m, std::max<int64_t>(16, kWideBlockBytes / (4 * std::max(p.k, p.n))))) {
  }
  void add(const char* name, double bytes) { launches_.add(name, bytes, 0.0, blocks_); }

 private:
  Launches& launches_;
  int64_t blocks_;
};

Launches library_forward_wide(const Card& card, const Problem& p) {
  const double x = area(p.m, p.k), y = area(p.m, p.n);
  Launches launches;
  if (p.given_base) {
    launches.add("copy of y", 2 * kHalf * y);
  } else {
    launches.add(library_product(card, "base", p.m, p.n, p.k));
  }
  WidePasses passes(p, launches);
  passes.add("x to float32", (kHalf + kFloat) * x);
  if (p.dropout) passes.add("dropout of x", 2 * kFloat * x);
  passes.add("x A^T", kFloat * x);
  passes.add("S B^T", kFloat * y);
  passes.add("times s", 2 * kFloat * y);
  passes.add("plus", (kHalf + 2 * kFloat) * y);
  passes.add("round", (kFloat + kHalf) * y);
  return launches;
}

Launches library_backward(const Card& card, const Problem& p) {
  const double x = area(p.m, p.k);
  Launches launches;
  if (p.need_dlora_b) {
    launches.add("S to half", (kHalf + kFloat) * area(p.m, p.rank));
    launches.add(library_product(card, "dB", p.n, p.rank, p.m));
  }
  if (p.need_dx && !p.given_base) launches.add(library_product(card, "dX", p.m, p.k, p.n));
  if (!p.need_dx && !p.need_dlora_a) return launches;
  launches.add(library_product(card, "dS", p.m, p.rank, p.n));
  if (p.need_dlora_a) {
    if (p.dropout) launches.add("dropout of x", 2 * kHalf * x);
    launches.add(library_product(card, "dA", p.rank, p.k, p.m));
  }
  if (!p.need_dx) return launches;
  const bool plus = p.dropout && !p.given_base;
  launches.add(library_product(card, "dS A", p.m, p.k, p.rank, !p.dropout && !p.given_base));
  if (p.dropout) launches.add("dropout of dS A", 2 * kHalf * x);
  if (plus) launches.add("plus", 3 * kHalf * x);
  return launches;
}

Launches library_backward_wide(const Card& card, const Problem& p) {
  const double x = area(p.m, p.k), y = area(p.m, p.n);
  Launches launches;
  if (p.need_dx && p.given_base) launches.add("zeros", kHalf * x);
  if (p.need_dx && !p.given_base) launches.add(library_product(card, "dX", p.m, p.k, p.n));
  WidePasses passes(p, launches);
  passes.add("dY to float32", (kHalf + kFloat) * y);
  passes.add("times s", 2 * kFloat * y);
  if (p.need_dlora_b) passes.add("dB", kFloat * y);
  if (!p.need_dx && !p.need_dlora_a) return launches;
  passes.add("dS", kFloat * y);
  if (p.need_dlora_a) {
    passes.add("x to float32", (kHalf + kFloat) * x);
    if (p.dropout) passes.add("dropout of x", 2 * kFloat * x);
    passes.add("dA", kFloat * x);
  }
  if (!p.need_dx) return launches;
  passes.add("dS A", kFloat * x);
  if (p.dropout) passes.add("dropout of dS A", 2 * kFloat * x);
  passes.add("round", (kFloat + kHalf) * x);
  passes.add("plus", 3 * kHalf * x);
  return launches;
}

Launches our_forward(const Card& card, const Problem& p, const Plan& plan) {
  Launches launches;
  if (plan.is_decode()) {
    launches.add(decode_launch(card, p, plan, 1));
    return launches;
  }
  if (plan.a != kNone || plan.b != kNone)
    launches.add("lora_split", area(p.rank, p.k + p.n) * (kFloat + 2 * kHalf));
  if (plan.in_grid()) {
    launches.add("flags", 0.0);
  } else {
    const double sums = kFloat * plan.shrink.splits * area(p.m, plan.columns);
    const double bytes = kHalf * (area(p.m, p.k) + area(p.rank, p.k)) + sums;
    launches.add(skinny(card, "lora_shrink", bytes, area(p.m, p.k), plan.columns,
                        rate_of(main_loops_of(card).shrink, p.dropout)));
    launches.add("lora_reduce", sums + area(p.m, plan.columns) * (kHalf + kFloat));
  }
  Launch gemm = lora_gemm(card, p, plan, {p.m, p.n, p.k}, false);
  if (plan.given_base) gemm.bytes += kHalf * area(p.m, p.n);  // y, which it adds onto
  launches.add(gemm);
  if (plan.library_base()) launches.add(library_product(card, "base", p.m, p.n, p.k, true));
  return launches;
}

Launch wgrad_launch(const Card& card, const Problem& p, const Plan& plan) {
  const double t = kHalf * area(p.m, plan.columns);
  Launch wgrad{"lora_wgrad", 0.0, 0.0};
  const auto add = [&](int64_t columns, int splits, bool masked) {
    const double sums = kFloat * splits * area(plan.columns, columns);
    const Launch one = skinny(card, "", kHalf * area(p.m, columns) + t + sums, area(p.m, columns),
                              plan.columns, rate_of(main_loops_of(card).wgrad, masked));
    wgrad.bytes += one.bytes, wgrad.flop += one.flop;
  };
  if (plan.dlora_a.splits > 0) add(p.k, plan.dlora_a.splits, p.dropout);
  if (plan.db_apart()) add(p.n, plan.dlora_b.splits, false);
  return wgrad;
}

Launches our_backward(const Card& card, const Problem& p, const Plan& plan) {
  const double t = kHalf * area(p.m, plan.columns), dy = area(p.m, p.n);
  const double sums_b = kFloat * plan.dlora_b.splits * area(plan.columns, p.n);
  const double sums_a = kFloat * plan.dlora_a.splits * area(plan.columns, p.k);
  const double sums =
      kFloat * (plan.one_pass ? plan.panels : plan.shrink.splits) * area(p.m, plan.columns);
  Launches launches;
  if (plan.s != kNone || plan.a != kNone || plan.b != kNone) {
    const double adapters = p.float_adapters ? area(p.rank, p.k + p.n) * (kFloat + 2 * kHalf) : 0.0;
    launches.add("lora_split", area(p.m, p.rank) * kFloat + t + adapters);
  }
  if (plan.one_pass) {
    const double rate = main_loops_of(card).dsdb[plan.columns > 16];
    const double flop = 4.0 * dy * plan.columns / share_on_mma(card, rate);
    launches.add("lora_dsdb", kHalf * dy + t + sums + sums_b, flop);
  } else if (plan.shrink.splits > 0) {
    launches.add(skinny(card, "lora_shrink", kHalf * dy + sums, dy, plan.columns,
                        main_loops_of(card).shrink.plain));
  }
  if (plan.in_grid()) launches.add("flags", 0.0);
  if (plan.z != kNone) launches.add("lora_reduce", sums + t);
  Launch dx{"", 0.0, 0.0};
  if (plan.gemm.blocks > 0) {
    dx = lora_gemm(card, p, plan, {p.m, p.k, p.n}, p.dropout);
    launches.add(dx);
  }
  if (plan.has_wgrad()) {
    const Launch wgrad = wgrad_launch(card, p, plan);
    launches.add(plan.early_wgrad ? after_dx(card, wgrad, dx, plan, p) : wgrad);
  }
  if (plan.g_a != kNone || plan.g_b != kNone) launches.add("lora_reduce_wgrad", sums_a + sums_b);
  if (plan.library_base() && p.need_dx)
    launches.add(library_product(card, "dX", p.m, p.k, p.n, true));
  return launches;
}

}  // namespace

Sustained sustained_by(const Card& card) {
  const Generation& known = generation_of(card);
  const double sms = static_cast<double>(card.sms) / known.sms;
  return {sms * known.tflops, sms * known.dram_gb_s, 1.5};
}

double microseconds(const Launch& launch, const Sustained& rates) {
  const double products = launch.flop / (rates.tflops * 1e6);
  const double copies = launch.bytes / (rates.dram_gb_s * 1e3);
  return std::max(products, copies) + static_cast<double>(launch.times) * rates.gap_us;
}

Launch library_product(const Card& card, const char* name, int64_t m, int64_t n, int64_t k,
                       bool accumulate) {
  double least = 0.0;
  for (const LibraryTile& tile : kLibraryTiles) {
    const int64_t tiles = blocks_of(m, tile.rows) * blocks_of(n, tile.columns);
    const int64_t waves = blocks_of(tiles, card.sms);
    const int64_t splits =
        std::max<int64_t>(1, std::min(card.sms / tiles, blocks_of(k, kLibrarySplit)));
    const double flop = 2.0 * static_cast<double>(waves * card.sms) *
                        area(tile.rows, tile.columns) * static_cast<double>(k) /
                        static_cast<double>(splits) / tile.share;
    if (least == 0.0 || flop < least) least = flop;
  }
  const double passes = accumulate ? 2 : 1;
  return {name, kHalf * (area(m, k) + area(n, k) + passes * area(m, n)), least};
}

static_assert(std::size(kMainLoopsOnA100.tiles) == static_cast<size_t>(Tile::kDecode));
static_assert(std::size(kMainLoopsOnA100.decode_us) == std::size(kDecodeTiles));

double main_loop_share(const Card& card, const TileFacts& tile, bool masked) {
  if (tile.tile == Tile::kDecode) return 0.0;  // by decode_step_us
  const MainLoopRates& rates = main_loops_of(card);
  const double rate = rate_of(rates.tiles[static_cast<int>(tile.tile)], masked);
  return tile.wgmma ? rate / rates.library : share_on_mma(card, rate);
}

double decode_step_us(const Card& card, const DecodeTile& tile) {
  size_t at = 0;
  while (kDecodeTiles[at].batch != tile.batch) ++at;
  return main_loops_of(card).decode_us[at];
}

double tiles_flop(const Card& card, const TileFacts& tile, int64_t m, int64_t n, int64_t k,
                  bool masked) {
  const Waves waves = waves_of(card, tile, m, n);
  return tile_flop(card, tile, k, masked) * static_cast<double>(waves.whole * card.sms);
}

Launches launches_of(const Card& card, const Problem& p, const Plan& plan, bool backward) {
  if (plan.kernel) return backward ? our_backward(card, p, plan) : our_forward(card, p, plan);
  if (p.float_adapters && p.half_dtype)
    return backward ? library_backward_wide(card, p) : library_forward_wide(card, p);
  return backward ? library_backward(card, p) : library_forward(card, p);
}

double predicted_us(const Card& card, const Problem& p, const Plan& plan, bool backward) {
  const Sustained rates = sustained_by(card);
  double sum = 0.0;
  for (const Launch& launch : launches_of(card, p, plan, backward))
    sum += microseconds(launch, rates);
  return sum;
}

}  // namespace lora_ext::plan
