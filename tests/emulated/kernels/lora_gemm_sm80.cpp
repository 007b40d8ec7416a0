// Runs lora_gemm_sm80 on odd sizes, ranks and pitches, with one or three low-rank terms.
#include "emulated/kernels/lora_gemm_sm80.h"

#include "emulated/kernels/driver.h"
#include "emulated/kernels/gemm_problem.h"

namespace kernels {
namespace {

constexpr int kRanks[] = {1, 8, 16, 24, 64, 65, 130, 257};

// Columns past the rank, rounded up to the 16 of an mma, are not multiplied; each tile of Y reads
// its rows of P and T and its columns of Q and U once.
template <class Tile>
void compare_counters(int64_t m, int64_t n, int64_t k, int64_t rank, int64_t terms) {
  const int64_t row_tiles = (m + Tile::kM - 1) / Tile::kM,
                column_tiles = (n + Tile::kN - 1) / Tile::kN;
  const int64_t k16_steps = (k + 63) / 64 * 4 + terms * ((rank + 15) / 16);
  const int64_t flop = 2 * row_tiles * column_tiles * Tile::kM * Tile::kN * 16 * k16_steps;
  compare_count("operations of tensor cores", emulator::counters().mma_flop, flop);
  compare_copied_bytes((column_tiles * m + row_tiles * n) * (k + terms * rank) * 2);
}

template <Alignment kAlignment, class T, class Tile, bool kMNMajor, bool kMasked>
void run_gemm(const Case& run) {
  const auto [name, m, n, depth] = run.size;
  Random random(run.seed);
  const int k = random() % 6 == 0 || kAlignment == Alignment::kElement ? 0 : depth;
  const int rank = kRanks[random() % std::size(kRanks)];
  GemmProblem<T, kMNMajor, kMasked, kAlignment> problem(m, n, depth, k, rank, random,
                                                        adds_onto_base<Tile, kMNMajor>);
  const LoraGemmParams<T> params = problem.params();

  const int tiles = ((m + Tile::kM - 1) / Tile::kM) * ((n + Tile::kN - 1) / Tile::kN);
  const int blocks = 1 + static_cast<int>(random() % tiles);  // fewer blocks have more tiles
  emulator::Stream stream;
  stream.launch({.grid = dim3(static_cast<unsigned>(blocks)),
                 .block = dim3(Tile::kThreads),
                 .shared_bytes = Tile::kSharedBytes},
                lora_gemm_sm80<T, Tile, kMNMajor, kMasked>, params);
  run_timed(stream);

  compare_counters<Tile>(m, n, k, rank, problem.terms);
  problem.check();
}

}  // namespace

#define VARIANT(name, ...) {#name, run_gemm<Alignment::kVector, __VA_ARGS__>},
#define ELEMENT_VARIANT(name, ...) {#name, run_gemm<Alignment::kElement, __VA_ARGS__>},
const Program program{
    "lora_gemm_sm80",
    {LORA_GEMM_SM80_VARIANTS(VARIANT) LORA_GEMM_SM80_ELEMENT_VARIANTS(ELEMENT_VARIANT)},
    {{"even", 256, 128, 128},
     {"odd", 131, 77, 99},
     {"shallow", 130, 70, 61},
     {"tall", 1900, 65, 24},
     {"wide", 70, 300, 200},
     {"deep", 40, 70, 520},
     SIZES_OF_SLABS{"tiny", 3, 1, 5}}};

}  // namespace kernels
