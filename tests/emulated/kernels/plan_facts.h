// Facts of a plan that the tests count, and invariants of all plans.
#pragma once
#include <string>

#include "emulated/kernels/linear_case.h"
#include "emulated/kernels/operand.h"
#include "kernels/gemm/sm90a/pipeline.h"

namespace kernels {

inline int stages_of(plan::Tile tile) {
  return tile == plan::Tile::kPingpong128x192 ? LoraGemmSm90aTile128x192Pingpong::kStages
                                              : LoraGemmSm90aTile128x256::kStages;
}

// Reports the facts of a plan for `direction`; throws Difference if the plan breaks an invariant.
inline void tell_plan(const std::string& direction, const plan::Plan& plan, const LinearCase& c,
                      const RandomMask& mask) {
  if (!plan.has_kernels()) differ("no kernel: %s", plan.reason.c_str());
  const bool forward = direction == "forward";
  if (c.dropout && mask.reference.col_offset > 0 && mask.reference.col_offset % 32 == 0)
    tell(direction + ", columns of a shard");
  if (plan.decode() != nullptr) return tell(direction + ", decode");
  const plan::Tiled& tiled = *plan.tiled();
  if (!tiled.gemm) return;
  const plan::TileFacts& tile = facts_of(tiled.gemm->tile);
  tell(direction + ", " + (plan.hybrid() ? "hybrid" : tile.name));
  if (!tile.wgmma) return;

  const int64_t depth = forward ? c.k : c.n, columns = forward ? c.n : c.k;
  const int64_t pairs = (c.m + 2 * tile.rows - 1) / (2 * tile.rows);
  const int64_t tiles = pairs * ((columns + tile.columns - 1) / tile.columns);
  const int64_t terms = tiled.terms == 2 ? 3 : 1;
  const int64_t steps = (depth + 63) / 64 + terms * ((c.rank + 63) / 64);
  const bool pingpong = std::string(tile.name).starts_with("pingpong");
  if (steps >= 2 * stages_of(tile.tile) && tiles > c.clusters)
    tell(direction + (pingpong ? ", pingpong laps" : ", cooperative laps"));
}

}  // namespace kernels
