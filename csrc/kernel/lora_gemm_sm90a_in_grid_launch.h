// From parameters to a launch of lora_gemm_in_grid_sm90a.
#pragma once
#include "kernel/lora_gemm_sm90a_in_grid.h"
#include "kernel/lora_gemm_sm90a_launch.h"

namespace lora_ext::kernel {

template <class Tile>
constexpr bool is_in_grid_as_planned(plan::Tile tile) {
  const plan::TileFacts& facts = plan::facts_of(tile);
  return facts.tile == tile && facts.in_grid && facts.rows == Tile::kM &&
         facts.columns == Tile::kN && facts.shared == JobTile<Tile>::kSharedBytes;
}
static_assert(is_in_grid_as_planned<LoraGemmSm90aTile128x256>(plan::Tile::kInGrid128x256));
static_assert(is_in_grid_as_planned<LoraGemmSm90aTile128x128>(plan::Tile::kInGrid128x128));

static_assert(parts_of_t(1) == LoraGemmSm90aTile128x256::kConsumers &&
              parts_of_t(1) == LoraGemmSm90aTile128x128::kConsumers);

// As launch_tile of lora_gemm_sm90a_launch.h; p.low_rank[0].t is in.t.
template <class T, class Tile, bool kMNMajor, bool kMasked, int kTail, class Launch>
void launch_in_grid_tail(const LoraGemmParams<T>& p, const LoraInGridParams<T>& in,
                         const InGridFactor<T>& factor, const Sm90aChoice& choice, Launch& launch) {
  const auto kernel = lora_gemm_in_grid_sm90a<T, Tile, kMNMajor, kMasked, kTail>;
  const dim3 cluster(Tile::kClusterSize);
  Sm90aLaunch how{cluster, cluster, Tile::kThreads, JobTile<Tile>::kSharedBytes, false};
  how.grid.x *= clusters_for(pairs_of_tiles<Tile>(p), launch.clusters(kernel, how), choice);
  const auto encode = [&](auto... matrix) { return launch.encode(matrix...); };
  const LoraInGridMaps maps{maps_of<Tile, kMNMajor>(p, encode),
                            right_map<Tile, kMNMajor, kShrinkColumns<kTail>>(factor.a, p.rank, p.k,
                                                                             factor.pitch, encode)};
  launch(kernel, how, maps, p, in);
}

template <class T, class Tile, bool kMNMajor, bool kMasked, class Launch>
void launch_in_grid(const LoraGemmParams<T>& p, const LoraInGridParams<T>& in,
                    const InGridFactor<T>& factor, const Sm90aChoice& choice, Launch& launch) {
  switch (tail_of(p.rank)) {
    case 1:
      return launch_in_grid_tail<T, Tile, kMNMajor, kMasked, 1>(p, in, factor, choice, launch);
    case 2:
      return launch_in_grid_tail<T, Tile, kMNMajor, kMasked, 2>(p, in, factor, choice, launch);
    default:
      return launch_in_grid_tail<T, Tile, kMNMajor, kMasked, 4>(p, in, factor, choice, launch);
  }
}

template <class T, bool kMNMajor, bool kMasked, class Launch>
void launch_in_grid_product(const LoraGemmParams<T>& p, const LoraInGridParams<T>& in,
                            const InGridFactor<T>& factor, const Sm90aChoice& choice,
                            Launch& launch) {
  if (choice.tile == plan::Tile::kInGrid128x256)
    return launch_in_grid<T, LoraGemmSm90aTile128x256, kMNMajor, kMasked>(p, in, factor, choice,
                                                                          launch);
  return launch_in_grid<T, LoraGemmSm90aTile128x128, kMNMajor, kMasked>(p, in, factor, choice,
                                                                        launch);
}

template <class T, class Launch>
void launch_lora_gemm_in_grid_sm90a(const LoraGemmParams<T>& p, const LoraInGridParams<T>& in,
                                    const InGridFactor<T>& factor, const Sm90aChoice& choice,
                                    Launch& launch) {
  if (!choice.mn_major)
    return launch_in_grid_product<T, false, false>(p, in, factor, choice, launch);
  if (!choice.masked) return launch_in_grid_product<T, true, false>(p, in, factor, choice, launch);
  return launch_in_grid_product<T, true, true>(p, in, factor, choice, launch);
}

}  // namespace lora_ext::kernel
