// Runs lora_grouped_wgrad and lora_grouped_reduce_wgrad: the gradients of both factors or of one,
// of adapters with many pieces of rows, with one, and with none.
#include "emulated/kernels/lora_grouped_wgrad.h"

#include "emulated/kernels/grouped_factors.h"
#include "emulated/kernels/grouped_gradients.h"
#include "emulated/kernels/variants.h"
#include "emulator/counts/counters.h"
#include "emulator/emulator.h"

namespace lora_ext::kernel {

#define EXTERN_INSTANCE(variant, ...) extern LORA_GROUPED_WGRAD_INSTANCE(__VA_ARGS__);
LORA_GROUPED_WGRAD_VARIANTS(EXTERN_INSTANCE)
LORA_GROUPED_REDUCE_WGRAD_INSTANCES(extern template, __nv_bfloat16);
LORA_GROUPED_REDUCE_WGRAD_INSTANCES(extern template, __half);

namespace {

using emulator::GlobalBuffer;
using kernels::Bounded;
using kernels::Case;
using kernels::Numbers;

template <class T, class F, bool kMasked, Alignment kAlignment>
std::string run_wgrad(const Case& run) {
  // Of hundreds of blocks, not all at a time: a thread has its own stack.
  uint32_t& resident = emulator::config().resident_clusters;
  if (resident == 0) resident = 24;
  const auto [name, m, groups, c] = run.size;
  std::mt19937_64 random(run.seed);
  const Numbers numbers = random() % 2 ? Numbers::Integers : Numbers::Reals;
  constexpr int kRanks[] = {1, 8, 17, 33, 65};
  const int most_rank = kRanks[random() % std::size(kRanks)];
  constexpr bool kSplit = std::is_same_v<F, float>;
  const int width = kernels::padded(most_rank), u_columns = (kSplit ? 2 : 1) * width;
  const kernels::GroupedRows rows(m, groups, most_rank, random);
  const int piece_rows = 64 * (1 + static_cast<int>(random() % 3));
  kernels::GroupedTables tables(rows, piece_rows);
  tables.fill(rows);
  const auto order = kernels::GroupedTables::positions(rows);
  const int columns[] = {c, 1 + static_cast<int>(random() % (2 * c))};
  const int wanted = 1 + static_cast<int>(random() % 3);
  const kernels::RandomMask mask(numbers, random);
  const bool with_mask = kMasked && random() % 4;
  kernels::GroupedGradients<F> gradients(rows, columns[1], columns[0], random() % 2);
  const GlobalBuffer<int> ranks(rows.ranks, "ranks");

  LoraGroupedWgradParams<T> params{};
  LoraGroupedReduceWgradParams sums{};
  std::vector<std::unique_ptr<kernels::Operand<T, kAlignment>>> p;
  std::vector<std::unique_ptr<kernels::Operand<T, Alignment::kVector>>> u;
  std::vector<std::unique_ptr<GlobalBuffer<float>>> partial;
  const int slots = LoraGroupedTables::slots_of(m, piece_rows);
  for (int i = 0; i < 2; ++i) {
    p.push_back(
        std::make_unique<kernels::Operand<T, kAlignment>>(m, columns[i], numbers, random, "p"));
    u.push_back(std::make_unique<kernels::Operand<T, Alignment::kVector>>(m, u_columns, numbers,
                                                                          random, "u"));
    const bool wants = wanted >> i & 1;
    partial.push_back(std::make_unique<GlobalBuffer<float>>(
        static_cast<size_t>(wants ? slots : 0) * most_rank * columns[i], "partial sums"));
    const int tiles =
        wants ? static_cast<int>(kernels::blocks_of(columns[i], LoraWgradTile::kC)) : 0;
    params.product[i] = {p[i]->data(),  u[i]->data(),       partial[i]->data(),
                         p[i]->pitch(), u[i]->pitch(),      columns[i],
                         tiles,         with_mask && i == 0};
    const float scale = with_mask && i == 0 ? mask.keep_scale : 1.f;
    sums.gradient[i] = {partial[i]->data(), wants ? columns[i] : 0, scale};
  }
  params.gradients = sums.gradients = gradients.parameters();
  params.factors.ranks = sums.factors.ranks = ranks.data();
  params.pieces = tables.pieces.data(), params.order = tables.parameters().order;
  params.m = m, params.most_rank = sums.most_rank = most_rank, params.lo_column = width;
  params.mask = mask.parameters();
  sums.sums = tables.sums.data();

  using Tile = LoraWgradTile;
  constexpr int kColumns = LoraGroupedWgradSm80<T, F, kMasked, kAlignment>::kColumns;
  emulator::Stream stream;
  stream.launch(
      {.grid = dim3(static_cast<unsigned>(tables.pieces.size()),
                    static_cast<unsigned>(params.product[0].c_tiles + params.product[1].c_tiles),
                    kernels::blocks_of(most_rank, kColumns)),
       .block = dim3(Tile::kThreads),
       .shared_bytes = Tile::kSharedBytes},
      lora_grouped_wgrad_sm80<T, F, kMasked, kAlignment>, params);
  stream.launch(
      {.grid = dim3(static_cast<unsigned>(groups), 1 + static_cast<unsigned>(random() % 3), 2),
       .block = dim3(256)},
      lora_grouped_reduce_wgrad<T, F>, sums);
  kernels::run_timed(stream);

  // P once for every kColumns of the rank, and U once for every 128 columns of P.
  uint64_t bytes = 0;
  for (int i = 0; i < m; ++i) {
    const int adapter = rows.adapter_of[i], rank = adapter < 0 ? 0 : rows.rank(adapter);
    for (int which = 0; which < 2; ++which) {
      const LoraGroupedWgradProduct<T>& product = params.product[which];
      if (product.c_tiles == 0) continue;
      bytes += 2ull * kernels::blocks_of(rank, kColumns) * product.c;
      bytes += 2ull * (kSplit ? 2 : 1) * rank * product.c_tiles;
    }
  }
  const auto copied =
      emulator::counters().global_bytes[static_cast<int>(emulator::GlobalAccess::CpAsync)];
  if (kAlignment == Alignment::kVector && copied != bytes)
    return emulator::format("expected %llu bytes copied, counted %llu",
                            static_cast<unsigned long long>(bytes),
                            static_cast<unsigned long long>(copied));

  const auto sum_of = [&](int which, int adapter, int r, int column) {
    Bounded sum;
    for (int position = 0; position < m; ++position) {
      const int row = order[position];
      if (rows.adapter_of[row] != adapter) continue;
      const double factor = with_mask && which == 0 ? mask.factor(row, column) : 1;
      const double p_at = factor * p[which]->matrix(row, column);
      sum.add(p_at * u[which]->matrix(position, r));
      if (kSplit) sum.add(p_at * u[which]->matrix(position, width + r) / kLoScale<T>);
    }
    return sum;
  };
  const bool exact = numbers == Numbers::Integers;
  const std::string difference = gradients.compare_a(
      wanted & 1, exact, [&](int g, int r, int column) { return sum_of(0, g, r, column); });
  if (!difference.empty()) return difference;
  return gradients.compare_b(wanted & 2, exact,
                             [&](int g, int r, int column) { return sum_of(1, g, r, column); });
}

#define VARIANT(name, ...) {#name, run_wgrad<__VA_ARGS__>},
const std::vector<kernels::Variant> kVariants = {LORA_GROUPED_WGRAD_VARIANTS(VARIANT)};

}  // namespace
}  // namespace lora_ext::kernel

int main(int argc, char** argv) {
  return kernels::variants_main(argc, argv, "lora_grouped_wgrad",
                                {{"even", 512, 4, 128},
                                 {"odd", 435, 3, 131},
                                 {"one_each", 40, 50, 72},
                                 {"one", 500, 1, 61},
                                 {"tiny", 1, 2, 3}},
                                lora_ext::kernel::kVariants);
}
