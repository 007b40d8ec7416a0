// What a plan is, as far as the tests count it, and what no plan may be.
#pragma once
#include <algorithm>
#include <string>

#include "emulated/kernels/linear_case.h"
#include "emulated/kernels/operand.h"
#include "kernel/lora_gemm_sm90a/tile.h"

namespace kernels {

inline int stages_of(lora_ext::plan::Tile tile) {
  using namespace lora_ext::kernel;
  return tile == lora_ext::plan::Tile::kPingpong128x192 ? LoraGemmSm90aTile128x192Pingpong::kStages
                                                        : LoraGemmSm90aTile128x256::kStages;
}

// Tells the facts of a plan for `direction`; "" or why no plan may be so.
inline std::string tell_plan(const std::string& direction, const lora_ext::plan::Plan& plan,
                             const LinearCase& c, const RandomMask& mask) {
  if (!plan.kernel) return "no kernel: " + plan.reason;
  const bool forward = direction == "forward";
  if (c.dropout && mask.reference.col_offset > 0 && mask.reference.col_offset % 32 == 0)
    kernels::tell(direction + ", columns of a shard");
  if (plan.gemm.blocks == 0) return "";
  const lora_ext::plan::TileFacts& tile = facts_of(plan.gemm.tile);
  kernels::tell(direction + ", " + (plan.hybrid ? "hybrid" : tile.name));
  if (!tile.wgmma) return "";

  const int64_t depth = forward ? c.k : c.n, columns = forward ? c.n : c.k;
  const int64_t pairs = (c.m + 2 * tile.rows - 1) / (2 * tile.rows);
  const int64_t tiles = pairs * ((columns + tile.columns - 1) / tile.columns);
  const int64_t terms = plan.terms == 2 ? 3 : 1;
  const int64_t steps = (depth + 63) / 64 + terms * ((c.rank + 63) / 64);
  const std::string kind = direction + (plan.in_grid() ? ", in grid" : ", wgmma");
  const bool pingpong = std::string(tile.name).starts_with("pingpong");
  kernels::tell(kind);
  if (steps >= 2 * stages_of(plan.gemm.tile) && tiles > c.clusters)
    kernels::tell(direction + (pingpong ? ", pingpong laps" : ", cooperative laps"));
  if (columns >= depth + 128) kernels::tell(kind + ", more columns than depth");
  if (depth >= columns + 128) kernels::tell(kind + ", more depth than columns");
  const bool half_of_one_step = !c.float_adapters && c.rank <= 64;
  if (plan.in_grid()) {
    if (!half_of_one_step || (forward && c.dropout))
      return direction + ": the planner makes T in the grid of a product that cannot";
    if (pairs * 2 * tile.rows - c.m >= tile.rows) kernels::tell(kind + ", an empty row block");
    if (std::min(tiles, c.clusters) > 3) kernels::tell(kind + ", more than 3 clusters");
    if (c.dropout) kernels::tell(kind + ", masked");
    kernels::tell(kind + (plan.early_wgrad ? ", early" : ", late"));
  } else if (!c.float_adapters && !(forward && c.dropout) && c.rank > 64 && c.rank <= 128) {
    kernels::tell(direction + ", rank above that of in grid");
  } else if (half_of_one_step && forward && c.dropout) {
    kernels::tell("forward, dropout keeps T out of the grid");
  }
  return "";
}

}  // namespace kernels
