// From parameters to a launch of lora_gemm_in_grid_sm90a.
#pragma once
#include "kernel/lora_gemm_sm90a_in_grid.h"
#include "kernel/lora_gemm_sm90a_launch.h"

namespace lora_ext::kernel {

// A of T = scaling P A, as Q lies: [rank, k], or MN-major [k, rank].
template <class T>
struct InGridFactor {
  const T* a;
  int64_t pitch;
};

// Whether one launch can make T, too.
template <class T>
bool fits_in_grid(const LoraGemmParams<T>& p) {
  return p.rank <= 64 && p.terms == 1 && p.k > 0;
}

// How many 32-bit flags LoraInGridParams::ready has.
template <class Tile, class T>
int64_t ready_flags(const LoraGemmParams<T>& p) {
  return (p.m + Tile::kPairM - 1) / Tile::kPairM * Tile::kClusterSize;
}

// As launch_tile of lora_gemm_sm90a_launch.h; p.low_rank[0].t is in.t.
template <class T, class Tile, bool kMNMajor, bool kMasked, int kTail, class Fault, class Launch>
void launch_in_grid_tail(const LoraGemmParams<T>& p, const LoraInGridParams<T>& in,
                         const InGridFactor<T>& factor, Launch& launch) {
  const auto kernel = lora_gemm_in_grid_sm90a<T, Tile, kMNMajor, kMasked, kTail, Fault>;
  const dim3 cluster(Tile::kClusterSize);
  Sm90aLaunch how{cluster, cluster, Tile::kThreads, JobTile<Tile>::kSharedBytes, false};
  how.grid.x *= clusters_for(pairs_of_tiles<Tile>(p), launch.clusters(kernel, how));
  const auto encode = [&](auto... matrix) { return launch.encode(matrix...); };
  const LoraInGridMaps maps{maps_of<Tile, kMNMajor>(p, encode),
                            right_map<Tile, kMNMajor, kShrinkColumns<kTail>>(factor.a, p.rank, p.k,
                                                                             factor.pitch, encode)};
  launch(kernel, how, maps, p, in);
}

template <class T, class Tile, bool kMNMajor, bool kMasked, class Fault, class Launch>
void launch_in_grid(const LoraGemmParams<T>& p, const LoraInGridParams<T>& in,
                    const InGridFactor<T>& factor, Launch& launch) {
  switch (tail_of(p.rank)) {
    case 1:
      return launch_in_grid_tail<T, Tile, kMNMajor, kMasked, 1, Fault>(p, in, factor, launch);
    case 2:
      return launch_in_grid_tail<T, Tile, kMNMajor, kMasked, 2, Fault>(p, in, factor, launch);
    default:
      return launch_in_grid_tail<T, Tile, kMNMajor, kMasked, 4, Fault>(p, in, factor, launch);
  }
}

// Pingpong tiles have no in-grid kernel: what would take one takes the cooperative tile of its
// size.
template <class T, bool kMNMajor, bool kMasked, class Fault, class Launch>
void launch_in_grid_product(const LoraGemmParams<T>& p, const LoraInGridParams<T>& in,
                            const InGridFactor<T>& factor, Sm90aTile tile, Launch& launch) {
  if (tile == Sm90aTile::k128x256)
    return launch_in_grid<T, LoraGemmSm90aTile128x256, kMNMajor, kMasked, Fault>(p, in, factor,
                                                                                 launch);
  return launch_in_grid<T, LoraGemmSm90aTile128x128, kMNMajor, kMasked, Fault>(p, in, factor,
                                                                               launch);
}

template <class T, class Fault, class Launch>
void launch_lora_gemm_in_grid_sm90a(const LoraGemmParams<T>& p, const LoraInGridParams<T>& in,
                                    const InGridFactor<T>& factor, const Sm90aChoice& choice,
                                    Launch& launch) {
  if (!choice.mn_major)
    return launch_in_grid_product<T, false, false, Fault>(p, in, factor, choice.tile, launch);
  if (!choice.masked)
    return launch_in_grid_product<T, true, false, Fault>(p, in, factor, choice.tile, launch);
  return launch_in_grid_product<T, true, true, Fault>(p, in, factor, choice.tile, launch);
}

}  // namespace lora_ext::kernel
