// Offsets of intermediates in one workspace.
#include "kernels/plan/steps.h"

namespace lora_ext::plan {
namespace {

struct Workspace {
  static constexpr int64_t kAlignBytes = 256;
  int64_t bytes = 0;
  int64_t take(int64_t elements, int64_t size) {
    const int64_t offset = bytes;
    bytes += rounded_up(elements * size, kAlignBytes);
    return offset;
  }
};

void place_tables(Tables& tables, const Problem& p, Workspace& workspace) {
  const Groups& groups = *p.groups;
  const int64_t lists = p.backward && (p.need_dlora_a || p.need_dlora_b) ? 2 : 1;
  if (groups.listed) tables.entries = workspace.take(lists * groups.count, kGroupedEntryBytes);
  if (groups.listed && lists == 2)
    tables.gradient_entries = tables.entries + groups.count * kGroupedEntryBytes;
  if (!groups.listed) tables.ranks = workspace.take(groups.count, 4);
  if (groups.indexed) {
    tables.order = workspace.take(p.m, 4);
    tables.counts = workspace.take(blocks_of(p.m, kGroupedChunk) * (groups.count + 1), 4);
  }
  tables.segments = workspace.take(groups.count + 1, kGroupedSegmentBytes);
  tables.first = workspace.take(blocks_of(p.m, kGroupedRowTileRows) + 1, 4);
  tables.tiles = workspace.take(tables.tile_count, kGroupedPieceBytes);
  if (groups.own_weights)
    tables.row_tiles = workspace.take(tables.row_tile_count, kGroupedPieceBytes);
  tables.pieces = workspace.take(tables.piece_count, kGroupedPieceBytes);
  tables.sums = workspace.take(groups.count, kGroupedSumBytes);
}

// Halves of A and B, unless the kernels can read A and B themselves.
void place_factors(Tiled& plan, const Problem& p, Workspace& workspace) {
  const bool needs_a = p.has_product() || !p.backward, needs_b = p.need_ds() || !p.backward;
  const int64_t element = element_size(p.dtype), chunk = chunk_elements(p.dtype);
  if (needs_a) plan.a_pitch = rounded_up(p.k, chunk);
  if (needs_a && (p.float_adapters || !p.aligned_a))
    plan.a = workspace.take(plan.terms * p.rank * plan.a_pitch, element);
  if (needs_b && (p.float_adapters || !p.aligned_b || p.rank % chunk != 0))
    plan.b = workspace.take(p.n * plan.columns, element);
}

void place_tiled(Tiled& plan, const Problem& p, Workspace& workspace) {
  // Kernels of many adapters read A and B directly.
  plan.tables ? place_tables(*plan.tables, p, workspace) : place_factors(plan, p, workspace);
  const int64_t halves = p.m * plan.columns, element = element_size(p.dtype);
  const bool need_t = !p.backward || p.need_ds();
  const bool need_db = p.backward && p.need_dlora_b, need_da = p.backward && p.need_dlora_a;
  if (need_db) plan.s = workspace.take(halves, element);
  if (need_t) plan.z = workspace.take(plan.t_sums() * p.m * plan.z_columns, kFloat);
  if (need_t) plan.t = workspace.take(halves, element);
  if (need_da && plan.tables && plan.tables->own_weights())
    plan.weighted_t = workspace.take(halves, element);
  // Partial sums: one per split, with many adapters one per slot.
  const auto sums = [&](const Splits& splits) {
    return plan.tables ? plan.tables->slots * p.rank : int64_t{splits.splits} * plan.columns;
  };
  if (need_db) plan.g_b = workspace.take(sums(plan.dlora_b) * p.n, kFloat);
  if (need_da) plan.g_a = workspace.take(sums(plan.dlora_a) * p.k, kFloat);
}

void place_decode(Decode& plan, const Problem& p, Workspace& workspace) {
  const DecodeTile& tile = decode_tile_for(p.m);
  const DecodeShares shares{static_cast<int>(plan.tiles), static_cast<int>(plan.s_tiles),
                            static_cast<int>(blocks_of(p.k, kStep)), plan.blocks};
  const int64_t elements = tile.rows * tile.batch;
  if (p.groups && p.groups->listed)
    plan.entries = workspace.take(p.groups->count, kGroupedEntryBytes);
  plan.sums = workspace.take(shares.slots() * elements, kFloat);
  plan.s_sums = workspace.take(shares.s_slots() * elements, kFloat);
  plan.t = workspace.take(p.m * plan.terms * plan.width, element_size(p.dtype));
  plan.flags = workspace.take(plan.flag_count(), kFloat);
}

}  // namespace

ExpertsTables experts_tables(int64_t m, int64_t experts) {
  ExpertsTables made{};
  Problem problem{};
  problem.m = m, problem.groups = Groups{experts, false, false, true};
  made.tables.piece_rows = static_cast<int>(experts_piece_rows(m));
  count_pieces(made.tables, m, experts);
  Workspace workspace;
  place_tables(made.tables, problem, workspace);
  made.bytes = workspace.bytes;
  return made;
}

void place_in_workspace(Plan& plan) {
  Workspace workspace;
  if (auto* tiled = std::get_if<Tiled>(&plan.sequence))
    place_tiled(*tiled, plan.problem, workspace);
  if (auto* decode = std::get_if<Decode>(&plan.sequence))
    place_decode(*decode, plan.problem, workspace);
  plan.workspace = workspace.bytes;
}

}  // namespace lora_ext::plan
