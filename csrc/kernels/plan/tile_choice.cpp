// Tiles of lora_gemm and lora_decode, splits of the skinny kernels, and blocks of all.
#include <algorithm>
#include <limits>

#include "kernels/plan/predict.h"
#include "kernels/plan/problem.h"
#include "kernels/plan/steps.h"

namespace lora_ext::plan {
namespace {

// Two blocks per SM, of two stages each; or, if shared memory has no room for both, one block of
// three stages: with one block of two stages, the loop would wait for copies (L40S: 0.65 of the
// tensor rate, 0.93 with three; A100: 0.92 with two blocks, 0.80 with one).
bool is_as_deep_as_fits(const TileFacts& tile, const Card& card) {
  if (tile.tile == Tile::k128x128) return two_blocks_fit(card);
  return tile.tile != Tile::kDeep128x128 || !two_blocks_fit(card);
}

// Per split: a pipeline of copies needs two to fill. A step of lora_dsdb is long: its pipeline turns
// over several times in one, and blocks of several steps would leave most SMs without a block.
constexpr int64_t kMinSteps = 4, kMinStepsOfDsdb = 1;

constexpr int64_t kMaxWgmmaRank = 256, kMaxFusedShrinkRank = 64;

// Enough splits for two blocks on every SM, but none too short to fill its pipeline of copies.
Splits choose_splits(const Card& card, int64_t blocks, int64_t length,
                     int64_t min_steps = kMinSteps) {
  const int64_t steps = blocks_of(length, kStep);
  const int64_t wanted = std::max<int64_t>(1, 2 * card.sms / blocks);
  const int64_t splits = std::clamp<int64_t>(wanted, 1, std::max<int64_t>(1, steps / min_steps));
  const int64_t per_split = blocks_of(steps, splits);
  return {static_cast<int>(blocks_of(steps, per_split)), static_cast<int>(per_split)};
}

// Why no kernel with wgmma and TMA computes a product on a card; "" if one can.
std::string why_no_wgmma(const Card& card, const Problem& p) {
  if (card.arch != 90) return "only compute capability 9.0 has it";
  if (!card.sm90a_code) return "this build has no code for 9.0a";
  if (!card.tensor_maps) return "the driver encodes no tensor maps";
  if (p.rank > kMaxWgmmaRank) return "the rank is above 256";
  if (p.groups) return "it cannot keep one adapter's sums from the rows of another";
  return "";
}

// Number of blocks that have work.
int64_t blocks_with_work(const Card& card, const TileFacts& tile, const Problem& p) {
  return (tile.wgmma ? 2 : 1) * waves_of(card, tile, p).tiles;
}

// Blocks on all SMs at once, by shared memory and by registers.
int64_t resident_blocks(const Card& card, int64_t shared, int64_t by_registers) {
  return card.sms * std::clamp<int64_t>(card.shared_per_sm / (shared + 1024), 1, by_registers);
}

// Masked tiles take T first, so all clusters wait while T is computed: half of the time of a tile of
// 256 columns, if each computes at most one pair of row blocks (predicted; both have the depth of
// the product). This saves a pass over dY, which takes longer the more rows there are: at an H100's
// rates both take the same time where two fifths of the clusters compute T.
bool masked_t_pays(const Card& card, int64_t m) {
  return 5 * blocks_of(m, 2 * facts_of(Tile::kFusedShrink128x256).rows) >= card.sms;
}

// T is computed in the same grid where possible, which saves two launches, unless there are fewer
// tiles than clusters: then all would wait for T.
bool fused_shrink_pays(const Card& card, const Problem& p) {
  return (!p.dropout || masked_t_pays(card, p.m)) &&
         blocks_with_work(card, facts_of(Tile::kFusedShrink128x256), p) > card.sms;
}

// The requested tile, if the card and the call can have it; else the one whose waves are predicted
// to end first, among those on wgmma if there are any. If lora_gemm only adds a low-rank product,
// the smallest tile, of which most fit on an SM.
const TileFacts& choose_tile(const Card& card, const Problem& p, const Request& request,
                             const Tiled& plan) {
  const TileFacts* best = &facts_of(Tile::k128x64);
  if (plan.base != Base::kKernel) return *best;
  const bool wgmma = why_no_wgmma(card, p).empty();
  // lora_dsdb computes dS without another pass over dY.
  const bool may_fused_shrink =
      wgmma && fits_fused_shrink(call_of(p)) && p.rank <= kMaxFusedShrinkRank && !plan.one_pass();
  const bool fused_shrink = may_fused_shrink && fused_shrink_pays(card, p);
  double best_time = 0;
  for (const TileFacts& tile : kTiles) {
    if (tile.tile == Tile::kDecode || !fits(tile, card, call_of(p))) continue;
    if ((tile.wgmma && !wgmma) || (tile.fused_shrink && !may_fused_shrink)) continue;
    if (p.groups && !has_grouped_kernel(tile.tile)) continue;
    if (tile.tile == request.tile) return tile;
    if (tile.wgmma != wgmma || tile.fused_shrink != fused_shrink) continue;
    const double time = tiles_flop(card, tile, p);
    if (best_time == 0 || time < best_time) best = &tile, best_time = time;
  }
  return *best;
}

Gemm choose_gemm(const Card& card, const Problem& p, const Request& request,
                 const TileFacts& tile) {
  const int64_t blocks =
      std::min(blocks_with_work(card, tile, p), resident_blocks(card, tile.shared, tile.resident));
  // As many clusters as are resident, which the driver tells; if some SMs are reserved for other
  // work, no more than fit on the rest.
  const int most = tile.wgmma ? card.sms : std::numeric_limits<int>::max();
  return {tile.tile, std::min(static_cast<int>(blocks), request.max_blocks),
          tile.wgmma && !tile.fused_shrink && request.use_pdl, std::min(most, request.max_blocks)};
}

// Whole waves of tiles leave some clusters idle at the end. If only those compute T before their
// first tile, it costs no time if they are done when the others have done their first tiles: a pair
// of row blocks takes half of the time of a tile of 256 columns (predicted). With two, the others
// wait for a tenth of a tile or more, but that is less than a pair takes a cluster that multiplies
// to the end. Masked tiles begin with T, which is complete the sooner the more clusters compute it.
int choose_pairs_per_ticket(const Card& card, const Problem& p, const TileFacts& tile) {
  constexpr int kMax = 2;
  if (p.dropout) return 1;
  const int64_t row_pairs = blocks_of(p.m, 2 * tile.rows), idle = waves_of(card, tile, p).idle();
  if (row_pairs <= idle) return 1;
  return blocks_of(row_pairs, kMax) <= idle ? kMax : 1;
}

void choose_product(Tiled& plan, const Card& card, const Problem& p, const Request& request) {
  const TileFacts& tile = choose_tile(card, p, request, plan);
  plan.gemm = choose_gemm(card, p, request, tile);
  if (card.arch == 90 && plan.base == Base::kKernel) plan.no_wgmma = why_no_wgmma(card, p);
  if (!tile.fused_shrink) return;
  plan.fused_shrink.emplace();
  plan.fused_shrink->row_blocks = 2 * blocks_of(p.m, 2 * tile.rows);
  plan.fused_shrink->pairs_per_ticket = choose_pairs_per_ticket(card, p, tile);
}

// Splits for S or dS, unless another kernel computes it.
void choose_shrink(Tiled& plan, const Card& card, const Problem& p) {
  // lora_shrink in a forward with one adapter takes A's halves without padding.
  const bool whole_chunks = p.backward || p.groups;
  plan.z_columns = whole_chunks ? plan.columns : static_cast<int>(plan.terms * p.rank);
  const bool needed = !p.backward || p.need_ds();
  if (!needed || plan.fused_shrink || plan.one_pass()) return;
  plan.shrink = choose_splits(card, blocks_of(p.m, 64) * blocks_of(plan.z_columns, 64), p.depth());
}

// Splits for dA and dB with one adapter.
void choose_gradients(Tiled& plan, const Card& card, const Problem& p, bool use_pdl) {
  const auto splits = [&](int64_t blocks) { return choose_splits(card, blocks, p.m); };
  const int64_t column_tiles = blocks_of(plan.columns, 64);
  if (plan.one_pass()) {
    // One block per SM.
    plan.dlora_b = choose_splits(card, 2 * plan.panels, p.m, kMinStepsOfDsdb);
  } else if (p.need_dlora_b) {
    plan.dlora_b = splits(blocks_of(p.n, 128) * column_tiles);
  }
  if (p.need_dlora_a) plan.dlora_a = splits(blocks_of(p.k, 128) * column_tiles);
  plan.wgrad_uses_pdl = plan.gemm && facts_of(plan.gemm->tile).wgmma && plan.has_wgrad() && use_pdl;
}

// Row tiles, and pieces of rows for the partial sums of gradients: sized so that one adapter alone
// would fill the card.
void choose_tables(Tiled& plan, const Card& card, const Problem& p) {
  Tables& tables = plan.tables.emplace();
  tables.piece_rows = static_cast<int>(rounded_up(p.m, kGroupedTileRows));  // nothing is summed
  if (p.backward) {
    const int64_t panels =
        (p.need_dlora_a ? blocks_of(p.k, 128) : 0) + (p.need_dlora_b ? blocks_of(p.n, 128) : 0);
    const Splits pieces =
        choose_splits(card, std::max<int64_t>(1, panels) * blocks_of(plan.columns, 64), p.m);
    tables.piece_rows = static_cast<int>(kStep) * pieces.steps_per_split;
    if (p.need_dlora_a) plan.dlora_a = pieces;
    if (p.need_dlora_b) plan.dlora_b = pieces;
  }
  const int64_t rows = tables.piece_rows, groups = p.groups->count;
  tables.tile_count = static_cast<int>(Tables::pieces_of(p.m, groups, kGroupedTileRows));
  tables.piece_count = static_cast<int>(Tables::pieces_of(p.m, groups, rows));
  tables.slots = static_cast<int>(Tables::slots_of(p.m, rows));
}

void choose_tiled(Tiled& plan, const Card& card, const Problem& p, const Request& request) {
  if (p.has_product()) choose_product(plan, card, p, request);
  choose_shrink(plan, card, p);
  if (p.groups) {
    choose_tables(plan, card, p);
  } else if (p.backward) {
    choose_gradients(plan, card, p, request.use_pdl);
  }
}

void choose_decode(Decode& plan, const Card& card, const Problem& p, const Request& request) {
  const DecodeTile& tile = decode_tile_for(p.m);
  plan.blocks = 1;
  const int64_t units = shares_of(plan, p).units();
  const int64_t wanted = std::max<int64_t>(1, units / DecodeShares::kMinUnits);
  const auto blocks =
      static_cast<int>(std::min(wanted, resident_blocks(card, tile.shared, tile.resident)));
  plan.blocks = std::min(blocks, request.max_blocks);
}

}  // namespace

std::optional<Tile> tile_named(const std::string& name) {
  for (const TileFacts& tile : kTiles)
    if (name == tile.name) return tile.tile;
  return std::nullopt;
}

bool fits(const TileFacts& tile, const Card& card, const Call& call) {
  return is_as_deep_as_fits(tile, card) && tile.shared <= card.shared_per_block &&
         (!tile.wgmma || (card.arch == 90 && card.sm90a_code && card.tensor_maps)) &&
         (!tile.fused_shrink || fits_fused_shrink(call)) &&
         (tile.tile != Tile::kDecode || (!call.backward && !call.dropout));
}

std::vector<Tile> tiles_of(const Card& card, const Call& call) {
  std::vector<Tile> tiles;
  for (const TileFacts& tile : kTiles)
    if (fits(tile, card, call)) tiles.push_back(tile.tile);
  return tiles;
}

void choose_tiles(Plan& plan, const Card& card, const Problem& p, const Request& request) {
  if (auto* tiled = std::get_if<Tiled>(&plan.sequence)) choose_tiled(*tiled, card, p, request);
  if (auto* decode = std::get_if<Decode>(&plan.sequence)) choose_decode(*decode, card, p, request);
}

}  // namespace lora_ext::plan
