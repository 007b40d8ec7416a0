// From parameters to a launch of lora_gemm_sm90a: the tensor maps, the instance and the grid.
//
// Requires what TMA requires: pointers and pitches that are multiples of 16 bytes. m, k and the rank
// may be anything. n, too, but Y is stored in chunks of 16 bytes: zeros follow the last of n columns
// that does not end one. The plan takes whole chunks alone.
#pragma once
#include <algorithm>
#include <limits>

#include "kernels/gemm/sm90a/kernel.h"
#include "kernels/plan/plan.h"

namespace lora_ext::kernel {

// Which instance computes a product, and on how many blocks.
struct Sm90aChoice {
  plan::Tile tile;                                   // a wgmma tile
  bool mn_major, masked;                             // dX, and dX with dropout
  bool dependent;                                    // as in Sm90aLaunch
  int max_blocks = std::numeric_limits<int>::max();  // two per cluster
};

// The launch configuration of lora_gemm_sm90a.
struct Sm90aLaunch {
  dim3 grid, cluster;
  unsigned threads;
  uint32_t shared_bytes;
  // Launched with PDL: the grid may start while the kernel before, which must write T, still runs.
  // That kernel must not be launched with PDL itself, unless it waits for its predecessor: all else
  // that lora_gemm reads and writes must be ready by then.
  bool dependent;
};

template <class Tile>
constexpr bool is_wgmma_as_planned(plan::Tile tile) {
  const plan::TileFacts& facts = plan::facts_of(tile);
  return facts.tile == tile && facts.wgmma && facts.rows == Tile::kM && facts.columns == Tile::kN &&
         facts.shared == Tile::kSharedBytes;
}
static_assert(is_wgmma_as_planned<LoraGemmSm90aTile128x256>(plan::Tile::kWgmma128x256));
static_assert(is_wgmma_as_planned<LoraGemmSm90aTile128x192Pingpong>(plan::Tile::kPingpong128x192));

// Tensor maps of P and T, and of Q and U, with the boxes of the stages.
// encode(const T* data, rows, columns, pitch, box rows) makes a CUtensorMap of boxes 64 elements
// wide with the 128-byte swizzle, which reads zeros outside of the matrix.
template <class Tile, bool kMNMajor, class T, class Encode>
LoraGemmMaps maps_of(const LoraGemmParams<T>& p, Encode&& encode) {
  const auto left = [&](const T* data, int depth, int64_t pitch) {
    return encode(data, p.m, depth, pitch, Tile::kLeftBoxRows);
  };
  const auto right = [&](const T* data, int depth, int64_t pitch) {
    constexpr int kRows = Tile::template kRightBoxRows<kMNMajor>;
    return kMNMajor ? encode(data, depth, p.n, pitch, kRows)
                    : encode(data, p.n, depth, pitch, kRows);
  };
  LoraGemmMaps maps{};
  if (p.k > 0) maps.p = left(p.p, p.k, p.p_pitch), maps.q = right(p.q, p.k, p.q_pitch);
  for (int i = 0; i < p.terms; ++i) {
    maps.low_rank[i].t = left(p.low_rank[i].t, p.rank, p.t_pitch);
    maps.low_rank[i].u = right(p.low_rank[i].u, p.rank, p.u_pitch);
  }
  maps.y = encode(p.y, p.m, p.n, p.y_pitch, Tile::kStoreBoxRows);
  return maps;
}

// Number of pairs of tiles, one pair per cluster.
template <class Tile, class T>
int64_t pairs_of_tiles(const LoraGemmParams<T>& p) {
  const int64_t row_pairs = (p.m + Tile::kPairM - 1) / Tile::kPairM;
  return row_pairs * ((p.n + Tile::kN - 1) / Tile::kN);
}

inline unsigned clusters_for(int64_t jobs, int64_t resident, const Sm90aChoice& choice) {
  const int64_t most = std::max(1, choice.max_blocks / 2);
  return static_cast<unsigned>(std::min({jobs, resident, most}));
}

// Calls use(kernel) with the instance for a rank.
template <class T, class Tile, bool kMNMajor, bool kMasked, class Use>
void with_instance_for(int rank, Use&& use) {
  if (plan::tail_of(rank) == 1) return use(lora_gemm_sm90a<T, Tile, kMNMajor, kMasked, 1>);
  return use(lora_gemm_sm90a<T, Tile, kMNMajor, kMasked, 4>);
}

// launch(kernel, Sm90aLaunch, maps, params) launches; launch.encode(...) is the encode of maps_of;
// launch.clusters(kernel, Sm90aLaunch) is the number of clusters resident at a time.
template <class T, class Tile, bool kMNMajor, bool kMasked, class Launch>
void launch_tile(const LoraGemmParams<T>& p, const Sm90aChoice& choice, Launch& launch) {
  with_instance_for<T, Tile, kMNMajor, kMasked>(p.rank, [&](auto kernel) {
    const dim3 cluster(Tile::kClusterSize);
    Sm90aLaunch config{cluster, cluster, Tile::kThreads, Tile::kSharedBytes, choice.dependent};
    config.grid.x *= clusters_for(pairs_of_tiles<Tile>(p), launch.clusters(kernel, config), choice);
    const auto encode = [&](auto... matrix) { return launch.encode(matrix...); };
    launch(kernel, config, maps_of<Tile, kMNMajor>(p, encode), p);
  });
}

template <class T, bool kMNMajor, bool kMasked, class Launch>
void launch_product(const LoraGemmParams<T>& p, const Sm90aChoice& choice, Launch& launch) {
  choice.tile == plan::Tile::kPingpong128x192
      ? launch_tile<T, LoraGemmSm90aTile128x192Pingpong, kMNMajor, kMasked>(p, choice, launch)
      : launch_tile<T, LoraGemmSm90aTile128x256, kMNMajor, kMasked>(p, choice, launch);
}

template <class T, class Launch>
void launch_lora_gemm_sm90a(const LoraGemmParams<T>& p, const Sm90aChoice& choice, Launch& launch) {
  if (!choice.mn_major) return launch_product<T, false, false>(p, choice, launch);
  if (!choice.masked) return launch_product<T, true, false>(p, choice, launch);
  return launch_product<T, true, true>(p, choice, launch);
}

}  // namespace lora_ext::kernel
