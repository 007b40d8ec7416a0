// Runs lora_gemm_sm90a on odd sizes, ranks and pitches, with one or three low-rank terms, behind
// the grid that writes T and before one that begins beside it and reads T, too.
#include "emulated/kernels/lora_gemm_sm90a.h"

#include "emulated/kernels/cluster_launch.h"
#include "emulated/kernels/gemm_problem.h"
#include "emulated/kernels/neighbours.h"
#include "emulated/kernels/variants.h"
#include "emulator/counts/counters.h"
#include "kernel/lora_gemm_sm90a/launch.h"

namespace kernels {

extern NEIGHBOUR_COPY(__half);
extern NEIGHBOUR_COPY(__nv_bfloat16);
extern NEIGHBOUR_COPY_EARLY(__half);
extern NEIGHBOUR_COPY_EARLY(__nv_bfloat16);

}  // namespace kernels

namespace lora_ext::kernel {

#define EXTERN_INSTANCES(variant, ...) LORA_GEMM_SM90A_INSTANCES(extern template, __VA_ARGS__)
LORA_GEMM_SM90A_VARIANTS(EXTERN_INSTANCES)

namespace {

using emulator::GlobalBuffer;
using kernels::Case;

// What lies past the rank is not multiplied, beyond the last step's 16s, each tile of Y asks once
// for its rows of P and T and each pair of tiles once for their columns of Q and U, rows of slabs
// lie in different banks, and Y is written once. "" or what differs.
template <class Tile>
std::string compare_counters(int64_t m, int64_t n, int64_t k, int64_t rank, int64_t terms) {
  const int64_t pairs = (m + Tile::kPairM - 1) / Tile::kPairM,
                column_tiles = (n + Tile::kN - 1) / Tile::kN;
  const int64_t last = rank % 64 == 0 ? 64 : rank % 64, tail = last <= 16 ? 1 : 4;
  const int64_t k16_steps = (k + 63) / 64 * 4 + terms * ((rank - 1) / 64 * 4 + tail);
  const int64_t flop = 2 * pairs * column_tiles * Tile::kPairM * Tile::kN * 16 * k16_steps;
  const int64_t loaded = (column_tiles * m + pairs * n) * (k + terms * rank) * 2;
  const emulator::Counters counted = emulator::counters();
  const auto bytes = [&](emulator::GlobalAccess kind) {
    return static_cast<int64_t>(counted.global_bytes[static_cast<int>(kind)]);
  };
  const int64_t loads = bytes(emulator::GlobalAccess::TmaLoad),
                stores = bytes(emulator::GlobalAccess::TmaStore);
  if (static_cast<int64_t>(counted.wgmma_flop) == flop && loads == loaded && stores == 2 * m * n &&
      counted.matrix_conflicts == 0)
    return "";
  return emulator::format(
      "expected %lld operations of tensor cores, %lld bytes loaded and %lld stored, counted %lld, "
      "%lld and %lld, and %lld bank conflicts",
      static_cast<long long>(flop), static_cast<long long>(loaded),
      static_cast<long long>(2 * m * n), static_cast<long long>(counted.wgmma_flop),
      static_cast<long long>(loads), static_cast<long long>(stores),
      static_cast<long long>(counted.matrix_conflicts));
}

template <class T, bool kMNMajor, bool kMasked, class Tile, plan::Tile kTile>
std::string run_gemm(const Case& run) {
  const auto [name, m, n, depth] = run.size;
  std::mt19937_64 random(run.seed);
  const int k = random() % 4 == 0 ? 0 : depth;
  const int rank = 1 + static_cast<int>(random() % (random() % 2 ? 256 : 64));
  kernels::GemmProblem<T, kMNMajor, kMasked, Alignment::kVector> problem(m, n, depth, k, rank,
                                                                         random, false);
  const int terms = problem.terms;
  LoraGemmParams<T> params = problem.params();
  std::unique_ptr<GlobalBuffer<T>> written_t[3];
  for (int i = 0; i < terms; ++i) {
    written_t[i] = std::make_unique<GlobalBuffer<T>>(problem.t[i]->matrix.values.size(), "t");
    params.low_rank[i].t = written_t[i]->data();
  }

  emulator::Stream stream;
  for (int i = 0; i < terms; ++i) {
    stream.launch({.grid = dim3(2), .block = dim3(128)}, kernels::copy<T>, problem.t[i]->data(),
                  written_t[i]->data(), static_cast<int>(written_t[i]->size()));
  }
  const auto pairs = static_cast<uint64_t>(pairs_of_tiles<Tile>(params));
  kernels::ClusterLaunch launch{
      stream, 1 + static_cast<int64_t>(random() % (pairs + 1))};  // few walk over many
  const bool dependent = random() % 2 != 0;
  launch_lora_gemm_sm90a<T>(params, {kTile, kMNMajor, kMasked, dependent}, launch);
  const GlobalBuffer<T>& last_t = *written_t[terms - 1];
  GlobalBuffer<T> seen_t(last_t.size(), "t as the next grid sees it");
  stream.launch({.grid = dim3(2), .block = dim3(128), .programmatic_dependent = true},
                kernels::copy_early<T>, last_t.data(), seen_t.data(),
                static_cast<int>(last_t.size()), static_cast<const uint32_t*>(nullptr), 0u);
  kernels::run_timed(stream);

  const std::string counted = compare_counters<Tile>(m, n, k, rank, terms);
  if (!counted.empty()) return counted;
  for (int i = 0; i < m; ++i) {
    for (int j = 0; j < rank; ++j) {
      const std::string difference = kernels::compare(
          "t as the next grid sees it", i, j, seen_t[static_cast<size_t>(i * params.t_pitch + j)],
          kernels::to_double(problem.t[terms - 1]->matrix(i, j)), 0);
      if (!difference.empty()) return difference;
    }
  }
  return problem.check();
}

#define VARIANT(name, T, mn_major, masked, tile, planned) \
  {#name, run_gemm<T, mn_major, masked, LoraGemmSm90aTile##tile, plan::Tile::planned>},
const std::vector<kernels::Variant> kVariants = {LORA_GEMM_SM90A_VARIANTS(VARIANT)};

}  // namespace
}  // namespace lora_ext::kernel

int main(int argc, char** argv) {
  return kernels::variants_main(argc, argv, "lora_gemm_sm90a",
                                {{"even", 256, 256, 128},
                                 {"odd", 131, 77, 99},
                                 {"wide", 70, 600, 200},
                                 {"tall", 3590, 264, 8},
                                 {"tiles", 520, 270, 130},
                                 {"deep", 40, 24, 700},
                                 {"tiny", 3, 1, 5}},
                                lora_ext::kernel::kVariants);
}
