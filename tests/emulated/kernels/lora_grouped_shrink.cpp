// Runs lora_grouped_shrink and lora_grouped_reduce with rows of many adapters, indexed or in
// ranges, and T from an S that was saved; also rows placed in each operand as with own weights,
// halves of both terms in a pool, and T with weights of rows.
#include "emulated/kernels/lora_grouped_shrink.h"

#include <algorithm>
#include <numeric>

#include "emulated/kernels/driver.h"
#include "emulated/kernels/grouped_factors.h"

namespace kernels {
namespace {

constexpr float kUnwritten = -12345;

// Bytes copied past L1: X once for every 64 columns of each adapter, and its factor once for every
// tile of rows, without what is out of bounds.
template <class F>
void compare_bytes(const GroupedRows& rows, GroupedTables& tables, const GroupedFactors<F>& factors,
                   bool of_b, int k, int terms) {
  int64_t bytes = 0;
  for (size_t i = 0; i < tables.tiles.size() && tables.tiles[i].count > 0; ++i) {
    const LoraGroupedPiece& tile = tables.tiles[i];
    const int rank = rows.rank(tile.adapter);
    const int columns = terms == 2 ? 2 * padded(rank) : rank;
    bytes += int64_t{(columns + 63) / 64} * tile.count * k * 2;
    if (of_b ? factors.b_in_chunks(tile.adapter) : factors.a_in_chunks(tile.adapter))
      bytes += int64_t{columns} * k * 2;
  }
  compare_copied_bytes(bytes);
}

template <class T, class F, bool kMNMajor, bool kMasked, Alignment kAlignment>
void run_shrink(const Case& run) {
  limit_residency();
  const auto [name, m, groups, k] = run.size;
  Random random(run.seed);
  const Numbers numbers = random() % 2 ? Numbers::Integers : Numbers::Reals;
  constexpr int kRanks[] = {1, 8, 17, 64, 65, 130};
  const int max_rank = kRanks[random() % std::size(kRanks)];
  constexpr bool kSplit = std::is_same_v<F, float>;
  const bool own = random() % 2, halves = own && !kSplit && random() % 2;
  const int width = padded(max_rank), terms = kSplit || halves ? 2 : 1;
  const GroupedRows rows(m, groups, max_rank, random, halves);
  GroupedTables tables(rows, 64);
  tables.fill(rows);
  const auto order = GroupedTables::positions(rows);
  const GroupedPlaces of_x(rows, own, false, random, "rows of x"),
      of_mask(rows, own, false, random, "rows of the mask"),
      of_s(rows, own, true, random, "rows of s");
  const int depth_n = kMNMajor ? k : 3, depth_k = kMNMajor ? 3 : k;
  const GroupedRows both = rows.with_rank(2 * width);  // hi's columns, then lo's
  const GroupedFactors<F> factors(halves ? both : rows, depth_n, depth_k, numbers, random);
  Operand<T, kAlignment> x(m, k, numbers, random, "x");
  const RandomMask mask(numbers, random);
  const float one_scaling = own ? 1.5f : NAN;
  const auto scaling_of = [&](int adapter) {
    return own ? one_scaling : static_cast<float>(adapter % 3 + 1) * 0.5f;
  };
  std::vector<float> scalings;
  for (int g = 0; g < groups; ++g) scalings.push_back(scaling_of(g));
  const GlobalBuffer<float> scaling(scalings, "scaling");

  const int steps = (k + 63) / 64, steps_per_split = 1 + static_cast<int>(random() % steps);
  const int splits = (steps + steps_per_split - 1) / steps_per_split, z_pitch = terms * width;
  GlobalBuffer<float> z(static_cast<size_t>(splits) * m * z_pitch, "z");
  const int t_pitch = width + 8;
  const bool with_s = random() % 4, with_lo = random() % 2, weighted = random() % 2;
  std::vector<float> weights;
  for (const int row : order)
    weights.push_back(rows.adapter_of[row] < 0 ? NAN : static_cast<float>(random() % 7) * 0.25f);
  FloatOrHalf<T> row_weights(weights.size(), random() % 2, "weights of rows");
  std::vector<int> slots(weights.size());  // of each position
  std::iota(slots.begin(), slots.end(), 0);
  const bool by_slot = random() % 2;
  if (by_slot) std::shuffle(slots.begin(), slots.end(), random);
  for (size_t at = 0; at < weights.size(); ++at) {
    if (row_weights.in_float) row_weights.floats[slots[at]] = weights[at];
    if (!row_weights.in_float) row_weights.halves[slots[at]] = from_double<T>(weights[at]);
  }
  const GlobalBuffer<int> slots_of(slots, "slots");
  const auto unwritten = from_double<T>(kUnwritten);
  const WrittenRows<float> s(m, max_rank, false, kUnwritten, "s");
  const WrittenRows<T> hi(m, t_pitch, false, unwritten, "hi"),
      lo(m, t_pitch, false, unwritten, "lo"),
      again(m, t_pitch, false, unwritten, "hi from the saved s"),
      beside(m, t_pitch, false, unwritten, "hi beside that of the saved s"),
      third(m, t_pitch, false, unwritten, "hi with weights beside those");

  LoraGroupedShrinkParams<T> shrink{};
  shrink.x = x.data(), shrink.x_pitch = x.pitch(), shrink.z = z.data(), shrink.z_pitch = z_pitch;
  shrink.m = m, shrink.k = k, shrink.max_rank = max_rank, shrink.terms = terms;
  shrink.steps_per_split = steps_per_split, shrink.factors = factors.pool.parameters();
  shrink.tiles = tables.tiles.data(), shrink.rows = of_x.data();
  shrink.mask_rows = of_mask.data(), shrink.mask = mask.parameters();
  LoraGroupedReduceParams<T> reduce{};
  reduce.of[0] = {z.data(),
                  with_s ? s.data() : nullptr,
                  nullptr,
                  {hi.data(), with_lo ? lo.data() : nullptr},
                  kMasked ? mask.keep_scale : 1.f,
                  {}};
  reduce.scaling = own ? nullptr : scaling.data(), reduce.one_scaling = one_scaling;
  reduce.t_pitch = t_pitch, reduce.m = m, reduce.splits = splits, reduce.terms = terms,
  reduce.z_pitch = z_pitch;
  reduce.max_rank = max_rank, reduce.factors = shrink.factors, reduce.tiles = shrink.tiles,
  reduce.rows = of_s.data();
  LoraGroupedReduceParams<T> from_saved = reduce;
  // In one launch: T from Z again, and T from the saved S, and if with weights of rows T from Z, too.
  from_saved.of[0].s = nullptr, from_saved.of[0].t[0] = beside.data();
  from_saved.of[1] = {nullptr, nullptr, s.data(), {again.data(), nullptr}, 1.f, {}};
  if (weighted) {
    from_saved.of[2] = from_saved.of[0];
    from_saved.of[2].t[0] = third.data(), from_saved.of[2].t[1] = nullptr;
    from_saved.of[1].row_weights = from_saved.of[2].row_weights = {
        row_weights.data(), row_weights.in_float, by_slot ? slots_of.data() : nullptr};
  }

  const auto tiles = static_cast<unsigned>(tables.tiles.size());
  const unsigned column_tiles = blocks_of(z_pitch, LoraShrinkTile::kN);
  emulator::Stream stream;
  stream.launch({.grid = dim3(tiles, column_tiles, static_cast<unsigned>(splits)),
                 .block = dim3(LoraShrinkTile::kThreads),
                 .shared_bytes = LoraShrinkTile::kSlabs},
                lora_grouped_shrink_sm80<T, F, kMNMajor, kMasked, kAlignment>, shrink);
  stream.launch({.grid = dim3(tiles), .block = dim3(256)}, lora_grouped_reduce<T>, reduce);
  if (with_s)
    stream.launch({.grid = dim3(tiles, from_saved.count()), .block = dim3(256)},
                  lora_grouped_reduce<T>, from_saved);
  run_timed(stream);
  if (kAlignment == Alignment::kVector) compare_bytes(rows, tables, factors, kMNMajor, k, terms);

  for (int position = 0; position < m; ++position) {
    const int row = order[position], adapter = rows.adapter_of[row], rank = rows.rank_of_row(row);
    for (int j = 0; j < t_pitch; ++j) {
      if (!with_lo || j >= rank) compare("lo", row, j, lo(position, j), to_double(unwritten), 0);
      if (j >= rank) {
        compare("hi", row, j, hi(position, j), to_double(unwritten), 0);
        if (j < max_rank) compare("s", row, j, s(of_s.row[position], j), kUnwritten, 0);
        continue;
      }
      Bounded expected;
      for (int l = 0; l < k; ++l) {
        const double factor = kMasked ? mask.factor(of_mask.row[position], l) : 1;
        const double left = factor * x.matrix(of_x.row[position], l);
        const auto right = [&](int at) {
          return kMNMajor ? factors.b(adapter, l, at) : factors.a(adapter, at, l);
        };
        for (const bool half : {false, true}) expected.add(left * half_of<T, F>(right(j), half));
        if (halves) expected.add(left * right(width + j) / kLoScale<T>);
      }
      const double error = numbers == Numbers::Integers && !halves ? 0 : expected.error();
      const double got = with_s ? s(of_s.row[position], j) : expected.value;
      compare("s", row, j, got, expected.value, error);
      compare_halves("t", row, j, hi(position, j), lo(position, j), with_lo,
                     scaling_of(adapter) * got, with_s ? 0 : 2 * error);
      if (!with_s) continue;
      const auto compare_again = [&](const WrittenRows<T>& t, double weight) {
        compare_halves("t of a launch of several", row, j, t(position, j), T{}, false,
                       weight * scaling_of(adapter) * got, 0);
      };
      compare_again(beside, 1), compare_again(again, weighted ? weights[position] : 1);
      if (weighted) compare_again(third, weights[position]);
    }
  }
}

}  // namespace

#define VARIANT(name, ...) {#name, run_shrink<__VA_ARGS__>},
const Program program{"lora_grouped_shrink",
                      {LORA_GROUPED_SHRINK_VARIANTS(VARIANT)},
                      {{"even", 256, 4, 256},
                       {"odd", 131, 3, 435},
                       {"one_each", 40, 50, 61},
                       {"one", 200, 1, 200},
                       {"tiny", 1, 2, 5}}};

}  // namespace kernels
