#include "plan/decode_plan.h"

#include <algorithm>
#include <sstream>

#include "plan/decode_shares.h"
#include "plan/plan_parts.h"

namespace lora_ext::plan {
namespace {

constexpr int64_t kStep = 64;
// Rows of all factors A, in blocks of 16, beyond which S is no small part of the work.
constexpr int64_t kMostFactorRows = 4096;

// Requests that L2 answers while DRAM delivers one byte: three fifths of what cards are said to do.
constexpr double kL2Share = 1.75;
// What a block does before its first bytes come, and the last one after the last have: its partial
// sums, the counting, those of others and their end, four round trips through L2. And of T B^T,
// for which B comes from DRAM and then T from L2, each time but the first (assumed).
constexpr double kEndsUs = 1.5, kRoundUs = 0.5;

// Times that T B^T of a tile waits for loads.
int64_t rounds_of(const Problem& p, int64_t adapters) {
  return blocks_of(adapters * blocks_of(p.rank, 16),
                   decode_pieces(decode_tile_for(p.m), p.float_adapters));
}

int64_t factor_rows(const Problem& p, int64_t adapters) {
  return adapters * 16 * blocks_of(p.rank, 16) * (p.float_adapters ? 2 : 1);
}

int64_t s_tiles_of(const Problem& p, int64_t adapters) {
  return blocks_of(factor_rows(p, adapters), decode_tile_for(p.m).rows);
}

bool shares_fit(const Problem& p, int64_t adapters) {
  const int64_t tiles = blocks_of(p.n, decode_tile_for(p.m).rows) + s_tiles_of(p, adapters);
  return tiles <= DecodeShares::kMostUnits / (blocks_of(p.k, kStep) + 1);
}

DecodeShares shares_of(const Problem& p, int64_t adapters, int64_t blocks) {
  const int64_t tiles = blocks_of(p.n, decode_tile_for(p.m).rows);
  return {static_cast<int>(tiles), static_cast<int>(s_tiles_of(p, adapters)),
          static_cast<int>(blocks_of(p.k, kStep)), static_cast<int>(blocks)};
}

}  // namespace

bool fits_decode(const Card& card, const Problem& p, int64_t adapters) {
  return p.m >= 1 && p.m <= kMostDecodeRows && p.n >= 1 && p.k >= 1 && p.weight_row_major &&
         p.aligned && p.aligned_weight && p.factor_rows && !p.dropout && !p.given_base &&
         factor_rows(p, adapters) <= kMostFactorRows && shares_fit(p, adapters) &&
         decode_tile_for(p.m).shared <= card.shared_per_block;
}

void place_decode(Plan& plan, const Card& card, const Problem& p, int64_t adapters,
                  const Request& request) {
  const DecodeTile& tile = decode_tile_for(p.m);
  Plan::Decode& decode = plan.decode;
  const int64_t units = shares_of(p, adapters, 1).units();
  const int64_t resident =
      std::clamp<int64_t>(card.shared_per_sm / (tile.shared + 1024), 1, tile.resident);
  const int64_t wanted = std::max<int64_t>(1, units / DecodeShares::kLeastUnits);
  plan.gemm = {Tile::kDecode, true, static_cast<int>(std::min(wanted, card.sms * resident)), false};
  limit_blocks(plan.gemm, request);
  decode.batch = static_cast<int>(tile.batch);
  decode.width = static_cast<int>(rounded_up(p.rank, 16));
  const DecodeShares shares = shares_of(p, adapters, plan.gemm.blocks);
  decode.tiles = shares.tiles, decode.s_tiles = shares.s_tiles;
  Workspace workspace{plan.workspace};
  const int64_t elements = tile.rows * tile.batch;
  plan.z = workspace.take(shares.slots() * elements, 4);
  decode.s_sums = workspace.take(shares.s_slots() * elements, 4);
  plan.t = workspace.take(p.m * plan.terms * decode.width, 2);
  plan.flags = workspace.take(plan.flag_count(), 4);
  plan.workspace = workspace.bytes;
}

// The longest of bytes of DRAM, requests of L2, which are X for each tile and partial sums out and
// in, and of the steps of a block; and the ends of the grid.
Launch decode_launch(const Card& card, const Problem& p, const Plan& plan, int64_t adapters) {
  const DecodeTile& tile = decode_tile_for(p.m);
  const Plan::Decode& decode = plan.decode;
  const double of_factor = p.float_adapters ? 4 : 2;
  const auto each = static_cast<double>(adapters);
  const double once = 2 * (area(p.n, p.k) + area(p.m, p.k) + area(p.m, p.n)) +
                      each * of_factor * area(p.rank, p.k + p.n);
  const double x_again = 2 * area(decode.tiles + decode.s_tiles - 1, p.m * p.k);
  const double sums = 8 * area(decode.tiles + plan.gemm.blocks, tile.rows * tile.batch);
  const DecodeShares shares = shares_of(p, adapters, plan.gemm.blocks);
  const int64_t steps = shares.units() + DecodeShares::kChunk * shares.all_chunks();
  const double loop =
      static_cast<double>(blocks_of(steps, shares.blocks)) * decode_step_us(card, tile);
  const double ends = kEndsUs + kRoundUs * static_cast<double>(rounds_of(p, adapters) - 1);
  const Sustained rates = sustained_by(card);
  return {"lora_decode",
          std::max(once, (once + x_again + sums) / kL2Share) + ends * 1e3 * rates.dram_gb_s,
          (loop + ends) * 1e6 * rates.tflops};
}

std::string describe_decode(const Plan& plan) {
  std::ostringstream text;
  text << "lora_decode up to " << plan.decode.batch << " rows, " << plan.gemm.blocks << " blocks, "
       << plan.decode.tiles << " tiles, " << plan.decode.s_tiles << " of S\n";
  return text.str();
}

}  // namespace lora_ext::plan
