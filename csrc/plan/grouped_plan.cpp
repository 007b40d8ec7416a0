#include "plan/grouped_plan.h"

#include <algorithm>
#include <sstream>

#include "plan/decode_plan.h"
#include "plan/plan_parts.h"
#include "plan/plan_prediction.h"

namespace lora_ext::plan {
namespace {

constexpr int64_t kMostGroups = int64_t{1} << 20, kMostColumnTiles = 65535;

std::string library_reason(const GroupedProblem& p) {
  if (p.groups < 1) return "there are no adapters";
  if (p.groups > kMostGroups) return "more than 2^20 adapters";
  if (blocks_of(p.one.n, 128) + blocks_of(p.one.k, 128) > kMostColumnTiles)
    return "too many columns for one grid";
  return "";
}

GroupedPlan begin(const Card& card, const GroupedProblem& p, const Request& request) {
  GroupedPlan plan;
  plan.one = begin_plan(card, p.one, request);
  if (!plan.one.kernel) return plan;
  const std::string reason = library_reason(p);
  if (reason.empty()) return plan;
  plan.one = Plan{};
  plan.one.reason = reason;
  return plan;
}

void place_tables(GroupedPlan& plan, const GroupedProblem& p, bool gradients,
                  Workspace& workspace) {
  const int64_t m = p.one.m, adapters = std::min(p.groups, m);
  plan.tile_count = static_cast<int>(blocks_of(m, kGroupedTileRows) + adapters);
  plan.piece_count = static_cast<int>(blocks_of(m, plan.piece_rows) + adapters);
  plan.slots = static_cast<int>(2 * (m / plan.piece_rows));
  if (p.listed) plan.entries = workspace.take(p.groups, kGroupedEntryBytes);
  if (p.listed && gradients) plan.gradient_entries = workspace.take(p.groups, kGroupedEntryBytes);
  if (p.indexed) {
    plan.order = workspace.take(m, 4);
    plan.counts = workspace.take(blocks_of(m, kGroupedChunk) * (p.groups + 1), 4);
  }
  plan.segments = workspace.take(p.groups + 1, kGroupedSegmentBytes);
  plan.first = workspace.take(blocks_of(m, kGroupedRowTileRows) + 1, 4);
  plan.tiles = workspace.take(plan.tile_count, kGroupedPieceBytes);
  plan.pieces = workspace.take(plan.piece_count, kGroupedPieceBytes);
  plan.sums = workspace.take(p.groups, kGroupedSumBytes);
}

void place_gemm(Plan& plan, const Card& card, const GroupedProblem& p, int64_t n, bool backward,
                const Request& request) {
  const Problem& one = p.one;
  const TileFacts* best = &facts_of(Tile::k128x64);
  if (!plan.hybrid) {
    double best_time = 0;
    for (const Tile tile : tiles_of(card, {backward, one.float_adapters, one.dropout})) {
      const TileFacts& facts = facts_of(tile);
      if (tile == Tile::kDecode || !has_grouped_kernel(tile)) continue;
      const double time =
          tiles_flop(card, facts, one.m, n, backward ? one.n : one.k, backward && one.dropout);
      if (request.tile == tile || best_time == 0 || time < best_time)
        best = &facts, best_time = time;
      if (request.tile == tile) break;
    }
  }
  plan.gemm = with_tile(card, *best, one.m, n, plan.vector);
  limit_blocks(plan.gemm, request);
}

// The most adapters that rows can have.
int64_t most_adapters(const GroupedProblem& p) { return std::min(p.groups, p.one.m); }

// Few rows, of which each says its adapter: in one launch.
bool fits_decode(const Card& card, const GroupedProblem& p) {
  return p.indexed && fits_decode(card, p.one, most_adapters(p));
}

GroupedPlan asked_forward(const Card& card, const GroupedProblem& p, const Request& request) {
  GroupedPlan plan = begin(card, p, request);
  Plan& one = plan.one;
  if (!one.kernel) return plan;
  const int64_t m = p.one.m;
  Workspace workspace;
  if (request.choice == Choice::kKernel && request.tile.value_or(Tile::kDecode) == Tile::kDecode &&
      fits_decode(card, p)) {
    if (p.listed) plan.entries = workspace.take(p.groups, kGroupedEntryBytes);
    one.workspace = workspace.bytes;
    place_decode(one, card, p.one, most_adapters(p), request);
    return plan;
  }
  plan.piece_rows = static_cast<int>(rounded_up(m, kGroupedTileRows));  // nothing is summed
  place_tables(plan, p, false, workspace);
  place_gemm(one, card, p, p.one.n, false, request);
  one.z_columns = one.columns;
  one.shrink = choose_splits(card, blocks_of(m, 64) * blocks_of(one.columns, 64), p.one.k);
  one.z = workspace.take(one.shrink.splits * m * one.z_columns, 4);
  one.t = workspace.take(m * one.columns, 2);
  one.workspace = workspace.bytes;
  return plan;
}

GroupedPlan asked_backward(const Card& card, const GroupedProblem& p, const Request& request) {
  GroupedPlan plan = begin(card, p, request);
  Plan& one = plan.one;
  if (!one.kernel) return plan;
  const int64_t m = p.one.m, k = p.one.k, n = p.one.n;
  const bool need_ds = p.one.need_dx || p.one.need_dlora_a;
  Workspace workspace;
  // Long enough that one adapter alone would fill the card.
  const int64_t panels =
      (p.one.need_dlora_a ? blocks_of(k, 128) : 0) + (p.one.need_dlora_b ? blocks_of(n, 128) : 0);
  const Splits pieces =
      choose_splits(card, std::max<int64_t>(1, panels) * blocks_of(one.columns, 64), m);
  plan.piece_rows = 64 * pieces.steps_per_split;
  place_tables(plan, p, p.one.need_dlora_a || p.one.need_dlora_b, workspace);
  if (p.one.need_dx) place_gemm(one, card, p, k, true, request);
  if (need_ds) {
    one.z_columns = one.columns;
    one.shrink = choose_splits(card, blocks_of(m, 64) * blocks_of(one.columns, 64), n);
    one.z = workspace.take(one.shrink.splits * m * one.z_columns, 4);
    one.t = workspace.take(m * one.columns, 2);
  }
  if (p.one.need_dlora_b) {
    one.dlora_b = pieces;
    one.s = workspace.take(m * one.columns, 2);
    one.g_b = workspace.take(plan.slots * p.one.rank * n, 4);
  }
  if (p.one.need_dlora_a) {
    one.dlora_a = pieces;
    one.g_a = workspace.take(plan.slots * p.one.rank * k, 4);
  }
  one.workspace = workspace.bytes;
  return plan;
}

// The library's base product and our update, or all of it by our kernels if that is predicted to be
// faster by more than a prediction may be off.
GroupedPlan predicted_best(const Card& card, const GroupedProblem& p, const Request& request,
                           bool backward) {
  Predicted us;
  const auto planned = [&](Choice choice, double& time) {
    Request asked = request;
    asked.choice = choice;
    GroupedPlan plan = backward ? asked_backward(card, p, asked) : asked_forward(card, p, asked);
    time = predicted_us(card, p, plan, backward);
    return plan;
  };
  GroupedPlan best = planned(Choice::kHybrid, us.hybrid);
  best.one.reason = p.one.given_base
                        ? "predicted: our kernels, which add onto y"
                        : "predicted: the library's base product, our kernels for all else";
  const bool has_base = !p.one.given_base && (!backward || p.one.need_dx);
  const bool decode = !backward && fits_decode(card, p);
  if (has_base && (p.one.m >= kFewestRows || decode) && may_make_base(p.one)) {
    GroupedPlan kernel = planned(Choice::kKernel, us.kernel);
    if (us.kernel < most_of_others(kernel.one) * us.hybrid) {
      kernel.one.reason =
          kernel.one.is_decode()
              ? "predicted: one launch that reads the weight once"
              : "predicted to be over 10 % faster than with the library's base product";
      best = std::move(kernel);
    }
  }
  best.one.predicted = us;
  return best;
}

}  // namespace

GroupedPlan grouped_forward(const Card& card, const GroupedProblem& p, const Request& request) {
  if (request.choice != Choice::kAuto) return asked_forward(card, p, request);
  GroupedPlan library = begin(card, p, request);
  return library.one.kernel ? predicted_best(card, p, request, false) : library;
}

GroupedPlan grouped_backward(const Card& card, const GroupedProblem& p, const Request& request) {
  if (request.choice != Choice::kAuto) return asked_backward(card, p, request);
  GroupedPlan library = begin(card, p, request);
  return library.one.kernel ? predicted_best(card, p, request, true) : library;
}

// As with one adapter, and the tables, and each other adapter's factors and gradients, which are
// read and written once; of products without a base, each adapter's low-rank steps are its own.
double predicted_us(const Card& card, const GroupedProblem& p, const GroupedPlan& plan,
                    bool backward) {
  const Problem& one = p.one;
  const Sustained rates = sustained_by(card);
  if (plan.one.is_decode()) {
    const double entries = p.listed ? microseconds({"entries", 0.0, 0.0}, rates) : 0.0;
    return entries + microseconds(decode_launch(card, one, plan.one, most_adapters(p)), rates);
  }
  const double element = one.float_adapters ? 4.0 : 2.0;
  const auto others = static_cast<double>(std::min(p.groups, one.m) - 1);
  const auto factors = static_cast<double>(one.rank * (one.k + one.n));
  double sum = predicted_us(card, one, plan.one, backward);
  sum += microseconds({"tables", 16.0 * static_cast<double>(one.m), 0.0, p.indexed ? 3 : 1}, rates);
  sum += others * factors * element * (backward ? 2.0 : 1.0) / (rates.dram_gb_s * 1e3);
  if (plan.one.gemm.blocks > 0 && !plan.one.hybrid) {
    const TileFacts& tile = facts_of(plan.one.gemm.tile);
    const int64_t n = backward ? one.k : one.n, row_tiles = blocks_of(one.m, tile.rows);
    const int64_t steps = (one.float_adapters ? 3 : 1) * 16 * blocks_of(one.rank, 16);
    const double again = others / static_cast<double>(row_tiles);  // adapters more in a tile
    const double whole =
        tiles_flop(card, tile, one.m, n, steps, false) - tiles_flop(card, tile, one.m, n, 0, false);
    sum += again * whole / (rates.tflops * 1e6);
  }
  return sum;
}

std::string GroupedPlan::describe() const {
  const std::string times =
      one.predicted.hybrid > 0 ? "\n  predicted: " + one.predicted.describe() : std::string();
  if (!one.kernel) return "library: " + one.reason + times;
  std::ostringstream text;
  text << (one.hybrid ? "hybrid: " : "kernels: ") << one.reason << times << "\n";
  if (entries != kNone) text << "  lora_grouped_entries\n";
  if (one.is_decode()) {
    text << "  " << describe_decode(one) << "  workspace " << one.workspace << " bytes";
    return text.str();
  }
  text << "  lora_grouped_" << (order != kNone ? "count, scan, place\n" : "scan\n");
  if (one.shrink.splits > 0) {
    text << "  lora_grouped_shrink " << one.shrink.splits << " splits of "
         << one.shrink.steps_per_split << " steps\n  lora_grouped_reduce\n";
  }
  if (one.s != kNone) text << "  lora_grouped_reduce S\n";
  if (one.gemm.blocks > 0) {
    text << "  lora_grouped_gemm " << facts_of(one.gemm.tile).name
         << (one.gemm.vector ? "" : ", element-wise stores") << ", " << one.gemm.blocks << " blocks"
         << (one.hybrid ? ", low rank\n" : "\n");
  }
  if (one.library_base() && one.gemm.blocks > 0) text << "  the library's base product, onto it\n";
  if (one.has_wgrad()) {
    text << "  lora_grouped_wgrad" << (one.g_a != kNone ? " A" : "")
         << (one.g_b != kNone ? " B" : "") << ", pieces of " << piece_rows << " rows\n"
         << "  lora_grouped_reduce_wgrad\n";
  }
  text << "  workspace " << one.workspace << " bytes";
  return text.str();
}

}  // namespace lora_ext::plan
