// Runs lora_grouped_wgrad and lora_grouped_reduce_wgrad: the gradients of both factors or of one,
// of adapters with many pieces of rows, with one, and with none; rows in one order, or placed in each
// operand as with own weights, whose gradients of B are interleaved.
#include "emulated/kernels/lora_grouped_wgrad.h"

#include <deque>

#include "emulated/kernels/driver.h"
#include "emulated/kernels/grouped_factors.h"

namespace kernels {
namespace {

template <class T, class F, bool kMasked, Alignment kAlignment>
void run_wgrad(const Case& run) {
  limit_residency();
  const auto [name, m, groups, c] = run.size;
  Random random(run.seed);
  const Numbers numbers = random() % 2 ? Numbers::Integers : Numbers::Reals;
  constexpr int kRanks[] = {1, 8, 17, 33, 65};
  const int max_rank = kRanks[random() % std::size(kRanks)];
  constexpr bool kSplit = std::is_same_v<F, float>;
  const int width = padded(max_rank), u_columns = (kSplit ? 2 : 1) * width;
  const GroupedRows rows(m, groups, max_rank, random);
  const int piece_rows = 64 * (1 + static_cast<int>(random() % 3));
  GroupedTables tables(rows, piece_rows);
  tables.fill(rows);
  const auto order = GroupedTables::positions(rows);
  const bool own = random() % 2;
  const GroupedPlaces of_p[] = {{rows, own, false, random, "rows of X"},
                                {rows, own, false, random, "rows of dY"}},
                      of_mask{rows, own, false, random, "rows of the mask"};
  const int columns[] = {c, 1 + static_cast<int>(random() % (2 * c))};
  const int wanted = 1 + static_cast<int>(random() % 3);
  const RandomMask mask(numbers, random);
  const bool with_mask = kMasked && random() % 4;
  GroupedGradients<F> gradients(rows, columns[1], columns[0], own || random() % 2, own);
  const GlobalBuffer<int> ranks(rows.ranks, "ranks");

  LoraGroupedWgradParams<T> params{};
  LoraGroupedReduceWgradParams sums{};
  std::deque<Operand<T, kAlignment>> p;
  std::deque<VectorOperand<T>> u;
  std::deque<GlobalBuffer<float>> partial;
  const auto slots = static_cast<int>(lora_ext::plan::Tables::slots_of(m, piece_rows));
  for (int i = 0; i < 2; ++i) {
    p.emplace_back(m, columns[i], numbers, random, "p");
    u.emplace_back(m, u_columns, numbers, random, "u");
    const bool wants = wanted >> i & 1;
    partial.emplace_back(static_cast<size_t>(wants ? slots : 0) * max_rank * columns[i],
                         "partial sums");
    const int tiles = wants ? static_cast<int>(blocks_of(columns[i], LoraWgradTile::kC)) : 0;
    params.product[i] = {p[i].data(),       of_p[i].data(), u[i].data(),
                         partial[i].data(), p[i].pitch(),   u[i].pitch(),
                         columns[i],        tiles,          with_mask && i == 0};
    const float scale = with_mask && i == 0 ? mask.keep_scale : 1.f;
    sums.gradient[i] = {partial[i].data(), wants ? columns[i] : 0, scale};
  }
  params.gradients = sums.gradients = gradients.pool.parameters();
  params.factors.ranks = sums.factors.ranks = ranks.data();
  params.pieces = tables.pieces.data(), params.mask_rows = of_mask.data();
  params.m = m, params.max_rank = sums.max_rank = max_rank, params.lo_column = width;
  params.mask = mask.parameters();
  sums.sums = tables.sums.data();

  using Tile = LoraWgradTile;
  constexpr int kColumns = LoraGroupedWgradSm80<T, F, kMasked, kAlignment>::kColumns;
  emulator::Stream stream;
  stream.launch(
      {.grid = dim3(static_cast<unsigned>(tables.pieces.size()),
                    static_cast<unsigned>(params.product[0].c_tiles + params.product[1].c_tiles),
                    blocks_of(max_rank, kColumns)),
       .block = dim3(Tile::kThreads),
       .shared_bytes = Tile::kSharedBytes},
      lora_grouped_wgrad_sm80<T, F, kMasked, kAlignment>, params);
  stream.launch(
      {.grid = dim3(static_cast<unsigned>(groups), 1 + static_cast<unsigned>(random() % 3), 2),
       .block = dim3(256)},
      lora_grouped_reduce_wgrad<T, F>, sums);
  run_timed(stream);

  // P once for every kColumns of the rank, and U once for every 128 columns of P.
  int64_t bytes = 0;
  for (int i = 0; i < m; ++i) {
    const int rank = rows.rank_of_row(i);
    for (int which = 0; which < 2; ++which) {
      const LoraGroupedWgradProduct<T>& product = params.product[which];
      if (product.c_tiles == 0) continue;
      bytes += int64_t{2} * blocks_of(rank, kColumns) * product.c;
      bytes += int64_t{2} * (kSplit ? 2 : 1) * rank * product.c_tiles;
    }
  }
  if (kAlignment == Alignment::kVector) compare_copied_bytes(bytes);

  for (const int which : {0, 1}) {
    const auto expected = [&](int adapter, int r, int column) {
      Bounded sum;
      for (int position = 0; position < m; ++position) {
        if (rows.adapter_of[order[position]] != adapter) continue;
        const bool masked = with_mask && which == 0;
        const double factor = masked ? mask.factor(of_mask.row[position], column) : 1;
        const double p_at = factor * p[which].matrix(of_p[which].row[position], column);
        sum.add(p_at * u[which].matrix(position, r));
        if (kSplit) sum.add(p_at * u[which].matrix(position, width + r) / kLoScale<T>);
      }
      return sum;
    };
    gradients.compare("ab"[which], wanted >> which & 1, numbers == Numbers::Integers, expected);
  }
}

}  // namespace

#define VARIANT(name, ...) {#name, run_wgrad<__VA_ARGS__>},
const Program program{"lora_grouped_wgrad",
                      {LORA_GROUPED_WGRAD_VARIANTS(VARIANT)},
                      {{"even", 512, 4, 128},
                       {"odd", 435, 3, 131},
                       {"one_each", 40, 50, 72},
                       {"one", 500, 1, 61},
                       {"tiny", 1, 2, 3}}};

}  // namespace kernels
