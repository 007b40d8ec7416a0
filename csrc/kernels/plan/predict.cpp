#include "kernels/plan/predict.h"

#include <algorithm>

#include "kernels/plan/rates.h"
#include "kernels/plan/steps.h"

namespace lora_ext::plan {
namespace {

constexpr double kFloat = 4;  // bytes

// The time of a tile outside of its products, as the columns of k that its main loop could have
// multiplied in that time. Counted in the machine code, wgmma's epilogue takes 1.2 % of a depth of
// 4096 (docs/kernels.md), and applying a mask, whose bits are drawn between products, 0.9 %;
// nothing of the epilogue if another warpgroup multiplies meanwhile. For mma.sync it is estimated,
// and bits are drawn outside of the loop.
struct TileEnd {
  int64_t epilogue, mask;
};
constexpr TileEnd kEndOnMma{128, 192}, kEndOnWgmma{64, 64};
// A draw for eight elements of a low-rank product alone takes some 80 instructions, of which an SM
// issues 128 per clock; here in operations per element of mma.sync on an H100's SM meanwhile.
constexpr double kDrawFlop = 150;
// A job that computes T for a pair of row blocks, in tiles of 128 x 256: in each step a block fills
// a stage with 128 rows of P and half of the pair's tile of A, at what an SM draws from L2, while a
// tile multiplies a stage at 4096 operations a clock. Beside tiles, which draw most of L2's rate, it
// takes longer (assumed).
constexpr double kL2BytesPerClock = 37.1, kTileClocks = 2.0 * 128 * 256 * 64 / 4096;
constexpr double kBesideTiles = 1.2;
// The fraction of a card's bandwidth that some of its SMs can draw, over the fraction of SMs.
constexpr double kShareOfDram = 2.5;

// For lora_decode: bytes that L2 delivers while DRAM delivers one, three fifths of the published
// ratio. Time of a block before its first bytes arrive, and of the last block after its last bytes:
// its partial sum, the arrival, the other partial sums and their end, four round trips through L2.
// Time of each round of T B^T but the first, for which B comes from DRAM and then T from L2
// (assumed).
constexpr double kL2Share = 1.75;
constexpr double kEndsUs = 1.5, kRoundUs = 0.5;

// Passes over m x k or m x n elements in our skinny kernels, whose columns are rounded up to 64.
Launch skinny(const Card& card, const char* name, double bytes, double elements, int columns,
              double of_tensor_rate, double draws = 0.0) {
  const double flop = 2.0 * 64 * static_cast<double>(blocks_of(columns, 64));
  return {name, bytes, elements * (flop + draws) / share_on_mma(card, of_tensor_rate)};
}

// A kernel with a block for each part: SMs have whole blocks, and the one with the most ends last.
// A block alone on an SM is assumed to be as fast as several together.
Launch in_waves(const Card& card, Launch launch, int64_t blocks) {
  launch.flop *=
      static_cast<double>(blocks_of(blocks, card.sms) * card.sms) / static_cast<double>(blocks);
  return launch;
}

// One product of floats is three of halves: hi hi, hi lo, lo hi.
int64_t rank_terms(const Problem& p) { return p.float_adapters ? 3 : 1; }
int64_t low_rank_depth(const Problem& p) { return rank_terms(p) * 16 * blocks_of(p.rank, 16); }

double tile_flop(const Card& card, const TileFacts& tile, int64_t depth, bool masked) {
  const bool overlapped = tile.tile == Tile::kPingpong128x192;
  const TileEnd& end = tile.wgmma ? kEndOnWgmma : kEndOnMma;
  depth += (overlapped ? 0 : end.epilogue) + (masked ? end.mask : 0);
  const double share = main_loop_share(card, tile, masked);
  return 2.0 * area(tile.rows, tile.columns) * static_cast<double>(depth) / share;
}

double job_tiles(const Problem& p) {
  const double bytes =
      element_bytes(p) * 64.0 * (128.0 + 8.0 * static_cast<double>(blocks_of(p.rank, 16)));
  return bytes / kL2BytesPerClock / kTileClocks;
}

// Time, in tiles, for which all wait for T. If clusters without a last tile compute it, the others
// wait at the end of their first tiles, for what a job takes longer than a tile.
double wait_for_t(const Problem& p, const FusedShrink& fused_shrink, const Waves& waves) {
  const double job = job_tiles(p) * fused_shrink.pairs_per_ticket;
  const int64_t tickets = blocks_of(fused_shrink.row_blocks / 2, fused_shrink.pairs_per_ticket);
  if (!p.masked_product() && tickets <= waves.idle())
    return std::max(0.0, kBesideTiles * job - 1.0);
  return job * static_cast<double>(blocks_of(tickets, waves.workers));
}

// Only a low-rank product, added onto the library's product or onto a given y.
Launch low_rank_gemm(const Card& card, const Problem& p, const Tiled& plan, double factors) {
  const double y = area(p.m, p.columns());
  const double onto = plan.base == Base::kGiven && !p.backward ? element_bytes(p) * y : 0.0;
  const MainLoopRate& rate = on(card, kTileRates[static_cast<int>(Tile::k128x64)]);
  return skinny(card, "lora_gemm", element_bytes(p) * y + factors + onto, y, plan.columns,
                rate.plain, p.masked_product() ? kDrawFlop : 0.0);
}

Launch lora_gemm(const Card& card, const Problem& p, const Tiled& plan) {
  const int64_t columns = p.columns(), depth = p.depth();
  const double factors =
      element_bytes(p) * static_cast<double>(rank_terms(p)) * area(p.rank, p.m + columns);
  if (plan.base != Base::kKernel) return low_rank_gemm(card, p, plan, factors);
  const TileFacts& tile = facts_of(plan.gemm->tile);
  const Waves waves = waves_of(card, tile, p);
  double bytes =
      element_bytes(p) * (area(p.m, depth) + area(columns, depth) + area(p.m, columns)) + factors;
  if (plan.fused_shrink) bytes += element_bytes(p) * area(p.rank, depth + p.m);
  const bool masked = p.masked_product();
  const double wave = tile_flop(card, tile, depth + low_rank_depth(p), masked) * card.sms;
  const double wait = plan.fused_shrink ? wait_for_t(p, *plan.fused_shrink, waves) : 0.0;
  return {"lora_gemm", bytes, wave * (static_cast<double>(waves.whole) + wait)};
}

// What is left of lora_wgrad after the last wave of dX, beside which it starts: it runs on the SMs
// that have no tile in that wave, and from the end of the first main loops on, since all blocks of
// a grid must have started before a dependent grid may.
Launch after_dx(const Card& card, const Launch& wgrad, const Launch& dx, const Waves& waves) {
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

// Bytes of the partial sums of S or dS.
double t_sum_bytes(const Problem& p, const Tiled& plan) {
  return kFloat * plan.t_sums() * area(p.m, plan.columns);
}

int64_t shrink_blocks(const Problem& p, const Tiled& plan) {
  return blocks_of(p.m, 64) * blocks_of(plan.z_columns, 64) * plan.shrink.splits;
}

Launches tiled_forward(const Card& card, const Problem& p, const Tiled& plan) {
  Launches launches;
  if (plan.a != kNone || plan.b != kNone)
    launches.add("lora_split", area(p.rank, p.k + p.n) * (kFloat + 2 * element_bytes(p)));
  if (plan.fused_shrink) {
    launches.add("flags", 0.0);
  } else {
    const double sums = t_sum_bytes(p, plan);
    const double bytes = element_bytes(p) * (area(p.m, p.k) + area(p.rank, p.k)) + sums;
    launches.add(in_waves(card,
                          skinny(card, "lora_shrink", bytes, area(p.m, p.k), plan.columns,
                                 rate_of(on(card, kShrinkRate), p.dropout)),
                          shrink_blocks(p, plan)));
    launches.add("lora_reduce", sums + area(p.m, plan.columns) * (element_bytes(p) + kFloat));
  }
  launches.add(lora_gemm(card, p, plan));
  if (plan.base == Base::kLibrary)
    launches.add(library_product(card, p.dtype, "base", p.m, p.n, p.k, true));
  return launches;
}

Launch wgrad_launch(const Card& card, const Problem& p, const Tiled& plan) {
  const double t = element_bytes(p) * area(p.m, plan.columns);
  Launch wgrad{"lora_wgrad", 0.0, 0.0};
  int64_t blocks = 0;
  const auto add = [&](int64_t columns, int splits, bool masked) {
    const double sums = kFloat * splits * area(plan.columns, columns);
    const Launch one =
        skinny(card, "", element_bytes(p) * area(p.m, columns) + t + sums, area(p.m, columns),
               plan.columns, rate_of(on(card, kWgradRate), masked));
    wgrad.bytes += one.bytes, wgrad.flop += one.flop;
    blocks += blocks_of(columns, 128) * blocks_of(plan.columns, 64) * splits;
  };
  if (plan.dlora_a.splits > 0) add(p.k, plan.dlora_a.splits, p.dropout);
  if (plan.db_apart()) add(p.n, plan.dlora_b.splits, false);
  return in_waves(card, wgrad, blocks);
}

// Adds the products of dX and of the gradients of A and B.
void add_products(const Card& card, const Problem& p, const Tiled& plan, Launches& launches) {
  Launch dx{"", 0.0, 0.0};
  if (plan.gemm) {
    dx = lora_gemm(card, p, plan);
    launches.add(dx);
  }
  if (plan.has_wgrad()) {
    const Launch wgrad = wgrad_launch(card, p, plan);
    launches.add(plan.wgrad_uses_pdl
                     ? after_dx(card, wgrad, dx, waves_of(card, facts_of(plan.gemm->tile), p))
                     : wgrad);
  }
}

Launches tiled_backward(const Card& card, const Problem& p, const Tiled& plan) {
  const double t = element_bytes(p) * area(p.m, plan.columns), dy = area(p.m, p.n);
  const double sums_b = kFloat * plan.dlora_b.splits * area(plan.columns, p.n);
  const double sums_a = kFloat * plan.dlora_a.splits * area(plan.columns, p.k);
  const double sums = t_sum_bytes(p, plan);
  Launches launches;
  if (plan.s != kNone || plan.a != kNone || plan.b != kNone) {
    const double adapters =
        p.float_adapters ? area(p.rank, p.k + p.n) * (kFloat + 2 * element_bytes(p)) : 0.0;
    launches.add("lora_split", area(p.m, p.rank) * kFloat + t + adapters);
  }
  if (plan.one_pass()) {
    const double rate = on(card, kDsdbRate[plan.columns > 16]);
    const double flop = 4.0 * dy * plan.columns / share_on_mma(card, rate);
    launches.add(in_waves(card, {"lora_dsdb", element_bytes(p) * dy + t + sums + sums_b, flop},
                          int64_t{plan.panels} * plan.dlora_b.splits));
  } else if (plan.shrink.splits > 0) {
    launches.add(in_waves(card,
                          skinny(card, "lora_shrink", element_bytes(p) * dy + sums, dy,
                                 plan.columns, on(card, kShrinkRate).plain),
                          shrink_blocks(p, plan)));
  }
  if (plan.fused_shrink) launches.add("flags", 0.0);
  if (plan.z != kNone) launches.add("lora_reduce", sums + t);
  add_products(card, p, plan, launches);
  if (plan.g_a != kNone || plan.g_b != kNone) launches.add("lora_reduce_wgrad", sums_a + sums_b);
  if (plan.base == Base::kLibrary && p.need_dx)
    launches.add(library_product(card, p.dtype, "dX", p.m, p.k, p.n, true));
  return launches;
}

// Number of times that T B^T of a tile waits for loads.
int64_t rounds_of(const Problem& p) {
  return blocks_of(p.adapters() * blocks_of(p.rank, 16),
                   decode_pieces(decode_tile_for(p.m), p.float_adapters));
}

// The longest of: bytes of DRAM; requests of L2, which are X for each tile and partial sums out and
// in; and the steps of a block; plus the start and the end of the grid.
Launch lora_decode(const Card& card, const Problem& p, const Decode& plan) {
  const DecodeTile& tile = decode_tile_for(p.m);
  const double element = element_bytes(p), of_factor = p.float_adapters ? kFloat : element;
  const auto each = static_cast<double>(p.adapters());
  const double once = element * (area(p.n, p.k) + area(p.m, p.k) + area(p.m, p.n)) +
                      each * of_factor * area(p.rank, p.k + p.n);
  const double x_again = element * area(plan.tiles + plan.s_tiles - 1, p.m * p.k);
  const double sums = 8 * area(plan.tiles + plan.blocks, tile.rows * tile.batch);
  const DecodeShares shares = shares_of(plan, p);
  const int64_t steps = shares.units() + DecodeShares::kChunk * shares.all_chunks();
  const double loop =
      static_cast<double>(blocks_of(steps, shares.blocks)) * decode_step_us(card, tile);
  const double ends = kEndsUs + kRoundUs * static_cast<double>(rounds_of(p) - 1);
  const Sustained rates = sustained_by(card);
  return {"lora_decode",
          std::max(once, (once + x_again + sums) / kL2Share) + ends * 1e3 * rates.dram_gb_s,
          (loop + ends) * 1e6 * rates.tflops};
}

// The additional time of many adapters: the tables, and the factors and gradients of each other
// adapter, which are read and written once; in products with our own base, also the low-rank steps
// of each adapter.
double us_of_many(const Card& card, const Problem& p, const Tiled& plan) {
  const Sustained rates = sustained_by(card);
  const double element = p.float_adapters ? kFloat : element_bytes(p);
  const auto others = static_cast<double>(p.adapters() - 1);
  const auto factors = static_cast<double>(p.rank * (p.k + p.n));
  double sum = microseconds(
      {"tables", 16.0 * static_cast<double>(p.m), 0.0, p.groups->indexed ? 3 : 1}, rates);
  sum += others * factors * element * (p.backward ? 2.0 : 1.0) / (rates.dram_gb_s * 1e3);
  if (plan.gemm && plan.base == Base::kKernel) {
    const TileFacts& tile = facts_of(plan.gemm->tile);
    const double again = others / static_cast<double>(blocks_of(p.m, tile.rows));
    const double waves = static_cast<double>(waves_of(card, tile, p).whole * card.sms);
    const double steps = tile_flop(card, tile, low_rank_depth(p), false) -  //
                         tile_flop(card, tile, 0, false);
    sum += again * waves * steps / (rates.tflops * 1e6);
  }
  return sum;
}

}  // namespace

Waves waves_of(const Card& card, const TileFacts& tile, const Problem& p) {
  const int64_t together = tile.wgmma ? 2 : 1;
  const int64_t workers = std::max<int64_t>(1, card.sms / together);
  const int64_t tiles = blocks_of(p.m, together * tile.rows) * blocks_of(p.columns(), tile.columns);
  return {blocks_of(tiles, workers), workers, tiles};
}

double tiles_flop(const Card& card, const TileFacts& tile, const Problem& p) {
  const Waves waves = waves_of(card, tile, p);
  return tile_flop(card, tile, p.depth(), p.masked_product()) *
         static_cast<double>(waves.whole * card.sms);
}

Launches launches_of(const Card& card, const Problem& p, const Plan& plan) {
  if (const Tiled* tiled = plan.tiled())
    return p.backward ? tiled_backward(card, p, *tiled) : tiled_forward(card, p, *tiled);
  if (plan.decode() == nullptr) return library_launches(card, p);
  Launches launches;
  if (p.groups && p.groups->listed) launches.add("entries", 0.0);
  launches.add(lora_decode(card, p, *plan.decode()));
  return launches;
}

double predicted_us(const Card& card, const Problem& p, const Plan& plan) {
  const Sustained rates = sustained_by(card);
  double sum = 0.0;
  for (const Launch& launch : launches_of(card, p, plan)) sum += microseconds(launch, rates);
  if (p.groups && plan.tiled() != nullptr) sum += us_of_many(card, p, *plan.tiled());
  return sum;
}

}  // namespace lora_ext::plan
