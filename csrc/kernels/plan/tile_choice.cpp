// Tiles of lora_gemm and lora_decode, splits of the skinny kernels, and blocks of all.
#include <algorithm>

#include "kernels/plan/problem.h"
#include "kernels/plan/steps.h"

namespace lora_ext::plan {
namespace {

constexpr int64_t kMaxWgmmaRank = 256;

// Two blocks of two stages per SM, or one of three: one of two would wait for copies.
bool is_as_deep_as_fits(const TileFacts& tile, const Card& card) {
  const bool two_fit = card.shared_per_sm >= 2 * (facts_of(Tile::k128x128).shared + 1024);
  if (tile.tile == Tile::k128x128) return two_fit;
  return tile.tile != Tile::kDeep128x128 || !two_fit;
}

// Enough splits for two blocks on every SM, but none too short to fill its pipeline of copies.
Splits choose_splits(const Card& card, int64_t blocks, int64_t length, int64_t min_steps = 4) {
  const int64_t steps = blocks_of(length, kStep), most = std::max<int64_t>(1, steps / min_steps);
  const int64_t splits = std::clamp<int64_t>(2 * card.sms / blocks, 1, most);
  const int64_t per_split = blocks_of(steps, splits);
  return {static_cast<int>(blocks_of(steps, per_split)), static_cast<int>(per_split)};
}

// The last step along k of an MN-major Q ends where its expert's rows do.
std::string why_no_wgmma_of_experts(const Problem& p) {
  if (!p.aligned || !p.aligned_weight) return "rows do not begin at multiples of 16 bytes";
  const bool mn_major = p.backward == p.weight_row_major;
  return mn_major && (p.depth() < kStep || p.depth() % 8 != 0)
             ? "the depth is below 64, or no multiple of 8"
             : "";
}

// Why no kernel with wgmma and TMA computes a product on a card; "" if one can.
std::string why_no_wgmma(const Card& card, const Problem& p) {
  if (card.arch != 90) return "only compute capability 9.0 has it";
  if (!card.sm90a_code) return "this build has no code for 9.0a";
  if (!card.tensor_maps) return "the driver encodes no tensor maps";
  if (p.own_weights()) return why_no_wgmma_of_experts(p);
  if (p.rank > kMaxWgmmaRank) return "the rank is above 256";
  if (p.groups) return "it cannot keep one adapter's sums from the rows of another";
  return "";
}

// Blocks on all SMs at once, by shared memory and by registers.
int64_t resident_blocks(const Card& card, int64_t shared, int64_t by_registers) {
  return card.sms * std::clamp<int64_t>(card.shared_per_sm / (shared + 1024), 1, by_registers);
}

void choose_product(Tiled& plan, const Card& card, const Problem& p, const Request& request) {
  const TileFacts& tile = facts_of(*request.tile);
  const int64_t tiles = p.own_weights() ? Tables::pieces_of(p.m, p.groups->count, tile.rows) *
                                              blocks_of(p.columns(), tile.columns)
                                        : tiles_of_product(tile, p);
  const auto blocks =
      static_cast<int>(std::min(tiles, resident_blocks(card, tile.shared, tile.resident)));
  // As many clusters as are resident, which the driver tells; if some SMs are reserved for other
  // work, no more than fit on the rest.
  const int most = tile.wgmma ? std::min(card.sms, request.max_blocks) : request.max_blocks;
  const bool use_pdl = tile.wgmma && !p.groups && request.use_pdl;
  plan.gemm = {tile.tile, std::min(blocks, request.max_blocks), use_pdl, most};
  if (card.arch == 90 && plan.base == Base::kKernel) plan.no_wgmma = why_no_wgmma(card, p);
}

// Splits for S or dS, unless another kernel computes it.
void choose_shrink(Tiled& plan, const Card& card, const Problem& p) {
  // lora_shrink in a forward with one adapter takes A's halves without padding.
  const bool whole_chunks = p.backward || p.groups;
  plan.z_columns = whole_chunks ? plan.columns : static_cast<int>(plan.terms * p.rank);
  if ((p.backward && !p.need_ds()) || plan.one_pass()) return;
  plan.shrink = choose_splits(card, blocks_of(p.m, 64) * blocks_of(plan.z_columns, 64), p.depth());
}

// Splits for dA and dB with one adapter. Of lora_dsdb one block per SM, whose pipeline turns over
// several times in a step: longer ones would leave most SMs without a block.
void choose_gradients(Tiled& plan, const Card& card, const Problem& p, bool use_pdl) {
  const auto splits = [&](int64_t columns) {
    return choose_splits(card, blocks_of(columns, 128) * blocks_of(plan.columns, 64), p.m);
  };
  if (p.need_dlora_a) plan.dlora_a = splits(p.k);
  if (p.need_dlora_b)
    plan.dlora_b = plan.one_pass() ? choose_splits(card, 2 * plan.panels, p.m, 1) : splits(p.n);
  plan.wgrad_uses_pdl = plan.gemm && facts_of(plan.gemm->tile).wgmma && plan.has_wgrad() && use_pdl;
}

}  // namespace

void count_pieces(Tables& tables, int64_t m, int64_t groups) {
  const int64_t rows = tables.piece_rows;
  tables.tile_count = static_cast<int>(Tables::pieces_of(m, groups, kGroupedTileRows));
  tables.row_tile_count = static_cast<int>(Tables::pieces_of(m, groups, kGroupedRowTileRows));
  tables.piece_count = static_cast<int>(Tables::pieces_of(m, groups, rows));
  tables.slots = static_cast<int>(Tables::slots_of(m, rows));
}

namespace {

// Row tiles, and pieces of rows for partial sums of gradients, with which one adapter fills a card.
void choose_tables(Tiled& plan, const Card& card, const Problem& p) {
  Tables& tables = plan.tables.emplace();
  // Forward sums nothing.
  const int64_t rows =
      p.own_weights() ? experts_piece_rows(p.m) : rounded_up(p.m, kGroupedTileRows);
  tables.piece_rows = static_cast<int>(rows);
  if (p.backward) {
    const int64_t panels =
        (p.need_dlora_a ? blocks_of(p.k, 128) : 0) + (p.need_dlora_b ? blocks_of(p.n, 128) : 0);
    const int64_t blocks = std::max<int64_t>(1, panels) * blocks_of(plan.columns, 64);
    Splits pieces{static_cast<int>(blocks_of(p.m, rows)), static_cast<int>(rows / kStep)};
    if (!p.own_weights()) pieces = choose_splits(card, blocks, p.m);
    tables.piece_rows = static_cast<int>(kStep) * pieces.steps_per_split;
    if (p.need_dlora_a) plan.dlora_a = pieces;
    if (p.need_dlora_b) plan.dlora_b = pieces;
  }
  count_pieces(tables, p.m, p.groups->count);
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
         (tile.tile != Tile::kDecode || (!call.backward && !call.dropout));
}

std::vector<Tile> tiles_of(const Card& card, const Call& call) {
  std::vector<Tile> tiles;
  for (const TileFacts& tile : kTiles)
    if (fits(tile, card, call)) tiles.push_back(tile.tile);
  return tiles;
}

// If lora_gemm only adds a low-rank product, the smallest tile, of which most fit on an SM. Tiles on
// wgmma alone if there are any, but for experts, who may have few rows each: the others have two
// thirds of the rate at most. lora_dsdb computes dS without another pass over dY.
std::vector<Tile> tiles_for(const Plan& plan, const Request& request) {
  const Problem& p = plan.problem;
  const Tiled* tiled = plan.tiled();
  if (tiled == nullptr || !p.has_product() || tiled->base != Base::kKernel) return {Tile::k128x64};
  const bool wgmma = why_no_wgmma(plan.card, p).empty();
  std::vector<Tile> tiles;
  for (const Tile each : tiles_of(plan.card, call_of(p))) {
    const TileFacts& tile = facts_of(each);
    const bool fits = p.own_weights()
                          ? has_experts_kernel(each, plan.card, tiled->vector, !p.weight_row_major)
                          : !p.groups || has_grouped_kernel(each);
    if (each == Tile::kDecode || !fits) continue;
    if (tile.wgmma && !wgmma) continue;
    if (each == request.tile) return {each};
    if (p.own_weights()) {  // of two that W's bytes bound alike, that on wgmma
      tiles.insert(tile.wgmma ? tiles.begin() : tiles.end(), each);
    } else if (tile.wgmma == wgmma) {
      tiles.push_back(each);
    }
  }
  return tiles.empty() ? std::vector{Tile::k128x64} : tiles;
}

void choose_tiles(Plan& plan, const Request& request) {
  const Card& card = plan.card;
  const Problem& p = plan.problem;
  if (auto* tiled = std::get_if<Tiled>(&plan.sequence)) {
    if (p.has_product()) choose_product(*tiled, card, p, request);
    choose_shrink(*tiled, card, p);
    if (p.groups) choose_tables(*tiled, card, p);
    if (p.backward && !p.groups) choose_gradients(*tiled, card, p, request.use_pdl);
  }
  if (auto* decode = std::get_if<Decode>(&plan.sequence)) {
    const DecodeTile& tile = decode_tile_for(p.m);
    const int64_t wanted = decode->tiles * blocks_of(p.k, kStep) / DecodeShares::kMinUnits;
    const int64_t most =
        std::min<int64_t>(resident_blocks(card, tile.shared, tile.resident), request.max_blocks);
    decode->blocks = static_cast<int>(std::clamp<int64_t>(wanted, 1, most));
  }
}

}  // namespace lora_ext::plan
