#include "plan/plan.h"

#include <algorithm>
#include <climits>
#include <iomanip>
#include <limits>
#include <sstream>
#include <utility>

#include "common/bounds.h"
#include "plan/decode_plan.h"
#include "plan/plan_parts.h"
#include "plan/plan_prediction.h"

namespace lora_ext::plan {
namespace {

constexpr int64_t kStep = 64;     // along the split dimension, in all skinny kernels
constexpr int64_t kMinSteps = 4;  // of a split: the copies need two to get going

constexpr int64_t kMostWgmmaRank = 256, kMostInGridRank = 64;

// Why no kernel with wgmma and TMA computes a product on a card; "" if one may.
std::string why_no_wgmma(const Card& card, const Problem& p) {
  if (card.arch != 90) return "only compute capability 9.0 has it";
  if (!card.sm90a_code) return "this build has no code for 9.0a";
  if (!card.tensor_maps) return "the driver encodes no tensor maps";
  if (p.rank > kMostWgmmaRank) return "the rank is above 256";
  return "";
}

// Of one half, one step of T U; and not of dropped X, which a tensor core cannot take from shared
// memory as it came.
bool fits_in_grid(const Call& call) {
  return !call.float_adapters && (call.backward || !call.dropout);
}

// Two blocks an SM, of two stages each, or where shared memory has no room for both, one block of
// three: with one of two stages, copies would be waited for (L40S: 0.65 of the tensor rate, 0.93
// with three; A100: 0.92 with two blocks, 0.80 with one).
bool is_as_deep_as_fits(const TileFacts& tile, const Card& card) {
  if (tile.tile == Tile::k128x128) return two_blocks_fit(card);
  return tile.tile != Tile::kDeep128x128 || !two_blocks_fit(card);
}

bool fits(const TileFacts& tile, const Card& card, const Call& call) {
  return is_as_deep_as_fits(tile, card) && tile.shared <= card.shared_per_block &&
         (!tile.wgmma || (card.arch == 90 && card.sm90a_code && card.tensor_maps)) &&
         (!tile.in_grid || fits_in_grid(call)) &&
         (tile.tile != Tile::kDecode || (!call.backward && !call.dropout));
}

// Masked tiles take T first, so all clusters stand still while T is made: 0.3 of the time of a tile
// of 256 columns, if each makes one pair of row blocks at most (predicted; the depth of both is
// that of the product). The pass over dY that this saves takes the longer the more rows there are:
// at an H100's rates as long where a fifth of the clusters make T.
bool masked_t_pays(const Card& card, int64_t m) {
  return 5 * blocks_of(m, 2 * facts_of(Tile::kInGrid128x256).rows) >= card.sms / 2;
}

// The tile that is asked for, if it can be had; else that whose waves are predicted to end first,
// of those on wgmma where they can be had. Where T can be made in the same grid it is, which saves
// two launches, unless there is not a tile for every cluster: then all would wait for T.
Gemm choose_gemm(const Card& card, const Problem& p, int64_t n, const Plan& plan, bool backward,
                 bool wgmma, const std::optional<Tile>& asked) {
  const int64_t depth = backward ? p.n : p.k;
  const bool masked = backward && p.dropout;
  const Call call{backward, p.float_adapters, p.dropout};
  // lora_dsdb makes dS without another pass over dY.
  const bool may_in_grid =
      wgmma && fits_in_grid(call) && p.rank <= kMostInGridRank && !plan.one_pass;
  const bool in_grid = may_in_grid && (!p.dropout || masked_t_pays(card, p.m)) &&
                       blocks_with_work(facts_of(Tile::kInGrid128x256), p.m, n) > card.sms;
  const TileFacts* best = &facts_of(Tile::k128x64);
  double best_time = 0;
  for (const TileFacts& tile : kTiles) {
    if (!fits(tile, card, call) || (tile.wgmma && !wgmma) || (tile.in_grid && !may_in_grid))
      continue;
    if (tile.tile == Tile::kDecode) continue;
    if (tile.tile == asked) return with_tile(card, tile, p.m, n, true);
    if (tile.wgmma != wgmma || tile.in_grid != in_grid) continue;
    const double time = tiles_flop(card, tile, p.m, n, depth, masked);
    if (best_time == 0 || time < best_time) best = &tile, best_time = time;
  }
  return with_tile(card, *best, p.m, n, true);
}

// Whole waves of tiles leave some clusters idle at the end. If those alone make T before their
// first tile, it costs no time, as long as they are done when the others have their first tiles: a
// pair of row blocks takes 0.3 of the time of a tile of 256 columns (predicted), and two are tried.
// Masked tiles begin with T, and the sooner the more clusters make it.
int choose_pairs_per_ticket(const Card& card, const TileFacts& tile, int64_t m, int64_t n,
                            bool masked) {
  constexpr int kMost = 2;
  if (masked) return 1;
  const int64_t clusters = std::max(1, card.sms / 2), row_pairs = blocks_of(m, 2 * tile.rows);
  const int64_t tiles = row_pairs * blocks_of(n, tile.columns);
  const int64_t idle = rounded_up(tiles, clusters) - tiles;
  if (row_pairs <= idle) return 1;
  return blocks_of(row_pairs, kMost) <= idle ? kMost : 1;
}

// Of Y or dX, [p.m, n]. Where it only adds a low-rank product, the smallest tile, of which most fit
// on an SM.
void place_gemm(Plan& plan, const Card& card, const Problem& p, int64_t n, bool backward,
                const Request& request) {
  if (plan.hybrid) {
    plan.gemm = with_tile(card, facts_of(Tile::k128x64), p.m, n, plan.vector);
    limit_blocks(plan.gemm, request);
    return;
  }
  const std::string why = why_no_wgmma(card, p);
  plan.gemm = choose_gemm(card, p, n, plan, backward, why.empty(), request.tile);
  limit_blocks(plan.gemm, request);
  plan.gemm.early = plan.gemm.early && request.early_launch;
  if (card.arch == 90) plan.no_wgmma = why;
}

// Why the library route computes a problem; "" if the kernels may.
std::string library_reason(const Card& card, const Problem& p, const Request& request) {
  const Choice choice = request.choice;
  if (choice == Choice::kLibrary && !request.measured.empty())
    return "fastest as measured " + request.measured;
  if (choice == Choice::kLibrary) return "the library route was asked for";
  if (!p.half_dtype) return "the kernels compute bfloat16 and float16";
  if (!card.error.empty()) return "CUDA cannot use the device: " + card.error;
  if (card.arch < 80) return "the kernels need compute capability 8.0 or later";
  if (choice == Choice::kKernel && !p.weight_row_major) return "the weight is not row-major";
  if (p.rank > kMaxRank) return "the rank is above 512";
  if (std::max({p.m, p.n, p.k}) > INT_MAX / 2) return "a size is above 2^30";
  if (blocks_of(p.m, kStep) * blocks_of(std::max(p.n, p.k), kStep) > INT_MAX)
    return "above 2^31 tiles";
  return "";
}

std::string kernel_reason(const Problem& p, const Request& request) {
  if (request.choice == Choice::kKernel && !p.given_base && !may_make_base(p))
    return "the library's base product, since rows do not begin at multiples of 16 bytes";
  if (!request.measured.empty()) return "fastest as measured " + request.measured;
  return request.choice == Choice::kKernel ? "the kernels were asked for"
                                           : "the hybrid route was asked for";
}

// A where it lies, if its rows are whole chunks of the kernels' type.
void place_a(Plan& plan, Workspace& workspace, const Problem& p) {
  plan.a_pitch = rounded_up(p.k, 8);
  const bool as_it_is = !p.float_adapters && p.aligned_a;
  if (!as_it_is) plan.a = workspace.take(plan.terms * p.rank * plan.a_pitch, 2);
}

void place_b(Plan& plan, Workspace& workspace, const Problem& p) {
  const bool as_it_is = !p.float_adapters && p.aligned_b && p.rank % 8 == 0;
  if (!as_it_is) plan.b = workspace.take(p.n * plan.columns, 2);
}

std::string describe_gemm(const Gemm& gemm) {
  std::ostringstream text;
  text << "lora_gemm " << facts_of(gemm.tile).name << (gemm.vector ? "" : ", element-wise stores")
       << ", " << gemm.blocks << " blocks" << (gemm.early ? ", begins early" : "");
  return text.str();
}

void place_flags(Plan& plan, const Card& card, const Problem& p, int64_t n, Workspace& workspace) {
  const TileFacts& tile = facts_of(plan.gemm.tile);
  plan.row_blocks = 2 * blocks_of(p.m, 2 * tile.rows);
  plan.flags = workspace.take(plan.flag_count(), 4);
  plan.pairs_per_ticket = choose_pairs_per_ticket(card, tile, p.m, n, p.dropout);
}

bool wants_decode(const Card& card, const Problem& p, const Request& request) {
  return request.choice == Choice::kKernel &&
         request.tile.value_or(Tile::kDecode) == Tile::kDecode && fits_decode(card, p, 1);
}

Plan asked_forward(const Card& card, const Problem& p, const Request& request) {
  Plan plan = begin_plan(card, p, request);
  if (!plan.kernel) return plan;
  if (wants_decode(card, p, request)) {
    place_decode(plan, card, p, 1, request);
    return plan;
  }
  Workspace workspace;
  place_a(plan, workspace, p);
  place_b(plan, workspace, p);
  place_gemm(plan, card, p, p.n, false, request);
  if (plan.in_grid()) {
    place_flags(plan, card, p, p.n, workspace);
  } else {
    plan.z_columns = static_cast<int>(plan.terms * p.rank);
    plan.shrink = choose_splits(card, blocks_of(p.m, 64) * blocks_of(plan.z_columns, 64), p.k);
    plan.z = workspace.take(plan.shrink.splits * p.m * plan.z_columns, 4);
  }
  plan.t = workspace.take(p.m * plan.columns, 2);
  plan.workspace = workspace.bytes;
  return plan;
}

Plan asked_backward(const Card& card, const Problem& p, const Request& request) {
  Plan plan = begin_plan(card, p, request);
  if (!plan.kernel) return plan;
  const bool need_ds = p.need_dx || p.need_dlora_a;
  Workspace workspace;
  if (p.need_dx) place_a(plan, workspace, p);
  if (need_ds) place_b(plan, workspace, p);
  if (p.need_dlora_b) plan.s = workspace.take(p.m * plan.columns, 2);

  // One pass over dY where its partial sums of dS, 8 bytes for each row, column and panel (4
  // written and 4 read), are at most half of what the second pass would read, 2 bytes an element.
  plan.z_columns = plan.columns;
  const int64_t panels = blocks_of(p.n, 16384 / (plan.columns <= 16 ? 16 : 32));
  plan.one_pass =
      need_ds && p.need_dlora_b && plan.columns <= 32 && 8 * plan.columns * panels <= p.n;
  if (p.need_dx) place_gemm(plan, card, p, p.k, true, request);
  if (plan.one_pass) {
    plan.panels = static_cast<int>(panels);
    plan.dlora_b = choose_splits(card, 2 * plan.panels, p.m);  // one block an SM
  } else {
    if (need_ds && !plan.in_grid()) {
      plan.shrink = choose_splits(card, blocks_of(p.m, 64) * blocks_of(plan.columns, 64), p.n);
    }
    if (p.need_dlora_b) {
      plan.dlora_b = choose_splits(card, blocks_of(p.n, 128) * blocks_of(plan.columns, 64), p.m);
    }
  }
  if (p.need_dlora_a) {
    plan.dlora_a = choose_splits(card, blocks_of(p.k, 128) * blocks_of(plan.columns, 64), p.m);
  }
  plan.early_wgrad = plan.gemm.blocks > 0 && facts_of(plan.gemm.tile).wgmma && plan.has_wgrad() &&
                     request.early_launch;
  if (plan.in_grid()) {
    place_flags(plan, card, p, p.k, workspace);
  } else if (need_ds) {
    const int64_t sums = plan.one_pass ? plan.panels : plan.shrink.splits;
    plan.z = workspace.take(sums * p.m * plan.z_columns, 4);
  }
  if (need_ds) plan.t = workspace.take(p.m * plan.columns, 2);
  if (p.need_dlora_b) plan.g_b = workspace.take(plan.dlora_b.splits * plan.columns * p.n, 4);
  if (p.need_dlora_a) plan.g_a = workspace.take(plan.dlora_a.splits * plan.columns * p.k, 4);
  plan.workspace = workspace.bytes;
  return plan;
}

// The route with the least predicted time; and our own base product only with a lead that is more
// than a prediction may be off, but of few rows: there the library's product, too, takes what its
// bytes take. Half adapters leave nothing but that to our kernels in a forward
// without a mask: x A^T is one pass over x in the library, too, and the expand its own first over
// Y.
Plan predicted_best(const Card& card, const Problem& p, const Request& request, bool backward) {
  Predicted us;
  const auto planned = [&](Choice choice, double& time) {
    Request asked = request;
    asked.choice = choice;
    Plan plan = backward ? asked_backward(card, p, asked) : asked_forward(card, p, asked);
    time = predicted_us(card, p, plan, backward);
    return plan;
  };
  Plan best;
  us.library = predicted_us(card, p, best, backward);
  if (backward || p.dropout || p.float_adapters) {
    Plan hybrid = planned(Choice::kHybrid, us.hybrid);
    if (us.hybrid <= us.library) best = std::move(hybrid);
  }
  best.reason = !best.hybrid   ? "predicted: the library for everything"
                : p.given_base ? "predicted: our kernels, which add onto y"
                               : "predicted: the library's base product, our kernels for all else";
  const bool decode = !backward && fits_decode(card, p, 1);
  const double other = best.hybrid ? us.hybrid : us.library;
  if (p.m < kFewestRows && !decode) {
    best.reason += ", as for all fewer than " + std::to_string(kFewestRows) + " rows";
  } else if (may_make_base(p)) {
    Plan kernel = planned(Choice::kKernel, us.kernel);
    if (us.kernel < most_of_others(kernel) * other) {
      kernel.reason = kernel.is_decode()
                          ? "predicted: one launch that reads the weight once"
                          : "predicted to be over 10 % faster than with the library's base product";
      best = std::move(kernel);
    }
  }
  best.predicted = us;
  return best;
}

}  // namespace

int64_t blocks_with_work(const TileFacts& tile, int64_t m, int64_t n) {
  const int64_t together = tile.wgmma ? 2 : 1;
  return together * blocks_of(m, together * tile.rows) * blocks_of(n, tile.columns);
}

Gemm with_tile(const Card& card, const TileFacts& tile, int64_t m, int64_t n, bool vector) {
  const int64_t fit = card.shared_per_sm / (tile.shared + 1024);
  const int64_t resident = std::clamp<int64_t>(fit, 1, tile.resident);
  const int64_t blocks = std::min(blocks_with_work(tile, m, n), card.sms * resident);
  // As many clusters as are resident, which the driver says; of a card with SMs left to others, no
  // more than its rest holds.
  const int most = tile.wgmma ? card.sms : std::numeric_limits<int>::max();
  return {tile.tile, vector, static_cast<int>(blocks), tile.wgmma && !tile.in_grid, most};
}

void limit_blocks(Gemm& gemm, const Request& request) {
  gemm.most_blocks = std::min(gemm.most_blocks, request.most_blocks);
  gemm.blocks = std::min(gemm.blocks, request.most_blocks);
}

Splits choose_splits(const Card& card, int64_t blocks, int64_t length) {
  const int64_t steps = blocks_of(length, kStep);
  const int64_t wanted = std::max<int64_t>(1, 2 * card.sms / blocks);
  const int64_t splits = std::clamp<int64_t>(wanted, 1, std::max<int64_t>(1, steps / kMinSteps));
  const int64_t per_split = blocks_of(steps, splits);
  return {static_cast<int>(blocks_of(steps, per_split)), static_cast<int>(per_split)};
}

Plan begin_plan(const Card& card, const Problem& p, const Request& request) {
  Plan plan;
  plan.reason = library_reason(card, p, request);
  plan.kernel = plan.reason.empty();
  if (!plan.kernel) return plan;
  plan.reason = kernel_reason(p, request);
  plan.given_base = p.given_base;
  plan.hybrid = request.choice == Choice::kHybrid || !may_make_base(p);
  plan.terms = p.float_adapters ? 2 : 1;
  plan.width = static_cast<int>(rounded_up(p.rank, 8));
  plan.columns = plan.terms * plan.width;
  plan.vector = p.aligned;
  return plan;
}

std::optional<Tile> tile_named(const std::string& name) {
  for (const TileFacts& tile : kTiles)
    if (name == tile.name) return tile.tile;
  return std::nullopt;
}

std::vector<Tile> tiles_of(const Card& card, const Call& call) {
  std::vector<Tile> tiles;
  for (const TileFacts& tile : kTiles)
    if (fits(tile, card, call)) tiles.push_back(tile.tile);
  return tiles;
}

bool Plan::in_grid() const { return gemm.blocks > 0 && facts_of(gemm.tile).in_grid; }

Plan forward(const Card& card, const Problem& p, const Request& request) {
  if (request.choice != Choice::kAuto) return asked_forward(card, p, request);
  Plan library = begin_plan(card, p, request);
  return library.kernel ? predicted_best(card, p, request, false) : library;
}

Plan backward(const Card& card, const Problem& p, const Request& request) {
  if (request.choice != Choice::kAuto) return asked_backward(card, p, request);
  Plan library = begin_plan(card, p, request);
  return library.kernel ? predicted_best(card, p, request, true) : library;
}

// "library 12 us, hybrid 11 us", without what was left out.
std::string Predicted::describe() const {
  std::ostringstream text;
  text << std::fixed << std::setprecision(1);
  const auto tell = [&](const char* route, double us) {
    if (us > 0) text << (text.tellp() > 0 ? ", " : "") << route << " " << us << " us";
  };
  tell("library", library), tell("hybrid", hybrid), tell("kernels", kernel);
  return text.str();
}

std::string Plan::describe() const {
  const std::string times =
      predicted.library > 0 ? "\n  predicted: " + predicted.describe() : std::string();
  if (!kernel) return "library: " + reason + times;
  std::ostringstream text;
  text << (hybrid ? "hybrid: " : "kernels: ") << reason << times << "\n";
  if (a != kNone || b != kNone || s != kNone) {
    text << "  lora_split " << (a != kNone ? "A " : "") << (b != kNone ? "B " : "")
         << (s != kNone ? "S " : "") << "into " << (terms == 2 ? "hi and lo" : "whole chunks")
         << "\n";
  }
  if (one_pass) {
    text << "  lora_dsdb " << panels << " panels, " << dlora_b.splits << " splits\n";
  } else if (shrink.splits > 0) {
    text << "  lora_shrink " << shrink.splits << " splits of " << shrink.steps_per_split
         << " steps\n";
  }
  if (z != kNone && !is_decode()) text << "  lora_reduce\n";
  if (is_decode()) {
    text << "  " << describe_decode(*this);
  } else if (gemm.blocks > 0) {
    text << "  " << describe_gemm(gemm) << (hybrid ? ", low rank\n" : "\n");
  }
  if (!no_wgmma.empty()) text << "  without wgmma: " << no_wgmma << "\n";
  if (library_base() && gemm.blocks > 0) text << "  the library's base product, onto it\n";
  if (has_wgrad()) {
    text << "  lora_wgrad";
    if (dlora_a.splits > 0) text << " A: " << dlora_a.splits << " splits";
    if (db_apart()) text << " B: " << dlora_b.splits << " splits";
    text << (early_wgrad ? ", begins early\n" : "\n");
  }
  if (g_a != kNone || g_b != kNone) text << "  lora_reduce_wgrad\n";
  text << "  workspace " << workspace << " bytes";
  return text.str();
}

}  // namespace lora_ext::plan
