// Runs lora_gemm_sm90a on odd sizes, ranks and pitches, with one or three low-rank terms, after the
// grid that writes T and before one that starts beside it and reads T, too.
#include "emulated/kernels/lora_gemm_sm90a.h"

#include "emulated/kernels/driver.h"
#include "emulated/kernels/gemm_problem.h"
#include "emulated/kernels/launch.h"
#include "emulated/kernels/neighbours.h"

namespace kernels {
namespace {

// Columns past the rank, rounded up to the last step's 16s, are not multiplied; each tile of Y
// reads its rows of P and T once, and each pair of tiles its columns of Q and U once; rows of slabs
// are in different banks, and Y is written once.
template <class Tile>
void compare_counters(int64_t m, int64_t n, int64_t k, int64_t rank, int64_t terms) {
  const int64_t pairs = (m + Tile::kPairM - 1) / Tile::kPairM,
                column_tiles = (n + Tile::kN - 1) / Tile::kN;
  const int64_t last = rank % 64 == 0 ? 64 : rank % 64, tail = last <= 16 ? 1 : 4;
  const int64_t k16_steps = (k + 63) / 64 * 4 + terms * ((rank - 1) / 64 * 4 + tail);
  const int64_t flop = 2 * pairs * column_tiles * Tile::kPairM * Tile::kN * 16 * k16_steps;
  compare_count("operations of tensor cores", emulator::counters().wgmma_flop, flop);
  compare_count("bytes loaded", counted_bytes(emulator::GlobalAccess::TmaLoad),
                (column_tiles * m + pairs * n) * (k + terms * rank) * 2);
  compare_count("bytes stored", counted_bytes(emulator::GlobalAccess::TmaStore),
                2 * m * padded(static_cast<int>(n)));
  compare_count("bank conflicts", emulator::counters().matrix_conflicts, 0);
}

template <class T, bool kMNMajor, bool kMasked, class Tile, plan::Tile kTile>
void run_gemm(const Case& run) {
  const auto [name, m, n, depth] = run.size;
  Random random(run.seed);
  const int k = random() % 4 == 0 ? 0 : depth;
  const int rank = 1 + static_cast<int>(random() % (random() % 2 ? 256 : 64));
  GemmProblem<T, kMNMajor, kMasked, Alignment::kVector> problem(m, n, depth, k, rank, random,
                                                                false);
  problem.stored = padded(n);  // TMA stores whole chunks of 16 bytes
  const int terms = problem.terms;
  LoraGemmParams<T> params = problem.params();
  std::unique_ptr<GlobalBuffer<T>> written_t[3];
  for (int i = 0; i < terms; ++i) {
    written_t[i] = std::make_unique<GlobalBuffer<T>>(problem.t[i]->matrix.values.size(), "t");
    params.low_rank[i].t = written_t[i]->data();
  }

  emulator::Stream stream;
  for (int i = 0; i < terms; ++i) {
    stream.launch({.grid = dim3(2), .block = dim3(128)}, copy<T>, problem.t[i]->data(),
                  written_t[i]->data(), static_cast<int>(written_t[i]->size()));
  }
  const auto pairs = static_cast<uint64_t>(pairs_of_tiles<Tile>(params));
  Launch launch{stream, 1 + static_cast<int64_t>(random() % (pairs + 1))};  // few have many tiles
  const bool dependent = random() % 2 != 0;
  launch_lora_gemm_sm90a<T>(params, {kTile, kMNMajor, kMasked, dependent}, launch);
  const GlobalBuffer<T>& last_t = *written_t[terms - 1];
  GlobalBuffer<T> seen_t(last_t.size(), "t as the next grid sees it");
  stream.launch({.grid = dim3(2), .block = dim3(128), .programmatic_dependent = true},
                copy_early<T>, last_t.data(), seen_t.data(), static_cast<int>(last_t.size()));
  run_timed(stream);

  compare_counters<Tile>(m, n, k, rank, terms);
  for (int i = 0; i < m; ++i) {
    for (int j = 0; j < rank; ++j) {
      compare("t as the next grid sees it", i, j,
              seen_t[static_cast<size_t>(i * params.t_pitch + j)],
              to_double(problem.t[terms - 1]->matrix(i, j)), 0);
    }
  }
  problem.check();
}

}  // namespace

#define VARIANT(name, T, mn_major, masked, tile, planned) \
  {#name, run_gemm<T, mn_major, masked, LoraGemmSm90aTile##tile, plan::Tile::planned>},
const Program program{"lora_gemm_sm90a",
                      {LORA_GEMM_SM90A_VARIANTS(VARIANT)},
                      {{"even", 256, 256, 128},
                       {"odd", 131, 77, 99},
                       {"wide", 70, 600, 200},
                       {"tall", 3590, 264, 8},
                       {"tiles", 520, 270, 130},
                       {"deep", 40, 24, 700},
                       {"tiny", 3, 1, 5}}};

}  // namespace kernels
