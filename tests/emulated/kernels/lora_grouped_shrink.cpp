// Runs lora_grouped_shrink and lora_grouped_reduce with rows of many adapters, indexed or in
// ranges, and T from an S that was saved.
#include "emulated/kernels/lora_grouped_shrink.h"

#include "emulated/kernels/grouped_factors.h"
#include "emulated/kernels/variants.h"
#include "emulator/counts/counters.h"
#include "emulator/emulator.h"

namespace lora_ext::kernel {

#define EXTERN_INSTANCE(variant, ...) extern LORA_GROUPED_SHRINK_INSTANCE(__VA_ARGS__);
LORA_GROUPED_SHRINK_VARIANTS(EXTERN_INSTANCE)
extern LORA_GROUPED_REDUCE_INSTANCE(__nv_bfloat16);
extern LORA_GROUPED_REDUCE_INSTANCE(__half);

namespace {

using emulator::GlobalBuffer;
using kernels::Bounded;
using kernels::Case;
using kernels::Numbers;

constexpr float kUnwritten = -12345;

// What is copied past L1: X once for every 64 columns of each adapter, and its factor once for
// every tile of rows, as far as they are there. "" or what differs.
template <class F>
std::string compare_bytes(const kernels::GroupedRows& rows, kernels::GroupedTables& tables,
                          const kernels::GroupedFactors<F>& factors, bool of_b, int k) {
  int64_t bytes = 0;
  for (size_t i = 0; i < tables.tiles.size() && tables.tiles[i].count > 0; ++i) {
    const LoraGroupedPiece& tile = tables.tiles[i];
    const int rank = rows.rank(tile.adapter);
    const int columns = sizeof(F) == 4 ? 2 * kernels::padded(rank) : rank;
    bytes += int64_t{(columns + 63) / 64} * tile.count * k * 2;
    if (of_b ? factors.b_in_chunks(tile.adapter) : factors.a_in_chunks(tile.adapter))
      bytes += int64_t{rank} * k * 2;
  }
  const auto copied =
      emulator::counters().global_bytes[static_cast<int>(emulator::GlobalAccess::CpAsync)];
  if (copied == static_cast<uint64_t>(bytes)) return "";
  return emulator::format("expected %lld bytes copied, counted %llu", static_cast<long long>(bytes),
                          static_cast<unsigned long long>(copied));
}

template <class T, class F, bool kMNMajor, bool kMasked, Alignment kAlignment>
std::string run_shrink(const Case& run) {
  // Of hundreds of blocks, not all at a time: a thread has its own stack.
  uint32_t& resident = emulator::config().resident_clusters;
  if (resident == 0) resident = 24;
  const auto [name, m, groups, k] = run.size;
  std::mt19937_64 random(run.seed);
  const Numbers numbers = random() % 2 ? Numbers::Integers : Numbers::Reals;
  constexpr int kRanks[] = {1, 8, 17, 64, 65, 130};
  const int most_rank = kRanks[random() % std::size(kRanks)];
  constexpr bool kSplit = std::is_same_v<F, float>;
  const int width = kernels::padded(most_rank), terms = kSplit ? 2 : 1;
  const kernels::GroupedRows rows(m, groups, most_rank, random);
  kernels::GroupedTables tables(rows, 64);
  tables.fill(rows);
  const auto order = kernels::GroupedTables::positions(rows);
  const int depth_n = kMNMajor ? k : 3, depth_k = kMNMajor ? 3 : k;
  const kernels::GroupedFactors<F> factors(rows, depth_n, depth_k, numbers, random);
  kernels::Operand<T, kAlignment> x(m, k, numbers, random, "x");
  const kernels::RandomMask mask(numbers, random);
  const auto scaling_of = [&](int adapter) { return static_cast<float>(adapter % 3 + 1) * 0.5f; };
  std::vector<float> scalings;
  for (int g = 0; g < groups; ++g) scalings.push_back(scaling_of(g));
  const GlobalBuffer<float> scaling(scalings, "scaling");

  const int steps = (k + 63) / 64, steps_per_split = 1 + static_cast<int>(random() % steps);
  const int splits = (steps + steps_per_split - 1) / steps_per_split, z_pitch = terms * width;
  GlobalBuffer<float> z(static_cast<size_t>(splits) * m * z_pitch, "z");
  GlobalBuffer<float> s(static_cast<size_t>(m) * most_rank, "s");
  const int t_pitch = width + 8;
  const bool with_s = random() % 4, with_lo = random() % 2;
  GlobalBuffer<T> hi(static_cast<size_t>(m) * t_pitch, "hi"), lo(hi.size(), "lo");
  GlobalBuffer<T> again(hi.size(), "hi from the saved s");
  s.fill(kUnwritten);
  for (auto* t : {&hi, &lo, &again}) t->fill(kernels::from_double<T>(kUnwritten));

  LoraGroupedShrinkParams<T> shrink{};
  shrink.x = x.data(), shrink.x_pitch = x.pitch(), shrink.z = z.data(), shrink.z_pitch = z_pitch;
  shrink.m = m, shrink.k = k, shrink.most_rank = most_rank;
  shrink.steps_per_split = steps_per_split, shrink.factors = factors.parameters();
  shrink.tiles = tables.tiles.data(), shrink.order = tables.parameters().order;
  shrink.mask = mask.parameters();
  LoraGroupedReduceParams<T> reduce{};
  reduce.z = z.data(), reduce.s = with_s ? s.data() : nullptr, reduce.scaling = scaling.data();
  reduce.t[0] = hi.data(), reduce.t[1] = with_lo ? lo.data() : nullptr, reduce.t_pitch = t_pitch;
  reduce.m = m, reduce.splits = splits, reduce.terms = terms, reduce.z_pitch = z_pitch;
  reduce.most_rank = most_rank, reduce.keep_scale = kMasked ? mask.keep_scale : 1.f;
  reduce.factors = shrink.factors, reduce.tiles = shrink.tiles, reduce.order = shrink.order;
  LoraGroupedReduceParams<T> from_saved = reduce;
  from_saved.z = nullptr, from_saved.s = nullptr, from_saved.saved = s.data();
  from_saved.t[0] = again.data(), from_saved.t[1] = nullptr;

  const auto tiles = static_cast<unsigned>(tables.tiles.size());
  const unsigned column_tiles = kernels::blocks_of(z_pitch, LoraShrinkTile::kN);
  emulator::Stream stream;
  stream.launch({.grid = dim3(tiles, column_tiles, static_cast<unsigned>(splits)),
                 .block = dim3(LoraShrinkTile::kThreads),
                 .shared_bytes = LoraShrinkTile::kSlabs},
                lora_grouped_shrink_sm80<T, F, kMNMajor, kMasked, kAlignment>, shrink);
  stream.launch({.grid = dim3(tiles), .block = dim3(256)}, lora_grouped_reduce<T>, reduce);
  if (with_s)
    stream.launch({.grid = dim3(tiles), .block = dim3(256)}, lora_grouped_reduce<T>, from_saved);
  kernels::run_timed(stream);
  if (kAlignment == Alignment::kVector) {
    const std::string counted = compare_bytes(rows, tables, factors, kMNMajor, k);
    if (!counted.empty()) return counted;
  }

  const double unwritten = kernels::to_double(kernels::from_double<T>(kUnwritten));
  for (int position = 0; position < m; ++position) {
    const int row = order[position], adapter = rows.adapter_of[row];
    const int rank = adapter < 0 ? 0 : rows.rank(adapter);
    for (int j = 0; j < t_pitch; ++j) {
      const size_t at = static_cast<size_t>(position) * t_pitch + j;
      const size_t in_s = static_cast<size_t>(row) * most_rank + j;
      const double high = kernels::to_double(hi[at]), low = kernels::to_double(lo[at]);
      if (j >= rank) {
        if (high != unwritten || low != unwritten || (j < most_rank && s[in_s] != kUnwritten))
          return emulator::format("row %d, column %d was written past the rank", row, j);
        continue;
      }
      Bounded expected;
      for (int l = 0; l < k; ++l) {
        const double factor = kMasked ? mask.factor(row, l) : 1;
        const double right = kMNMajor ? factors.b(adapter, l, j) : factors.a(adapter, j, l);
        for (const bool half : {false, true})
          expected.add(factor * x.matrix(row, l) * kernels::half_of<T, F>(right, half));
      }
      const double error = numbers == Numbers::Integers ? 0 : expected.error();
      const double got = with_s ? s[in_s] : expected.value;
      std::string difference = kernels::compare("s", row, j, got, expected.value, error);
      if (!difference.empty()) return difference;
      const double t = scaling_of(adapter) * got, unit = kernels::rounding_unit<T>();
      const double floor = with_lo ? 0x1p-25 / kLoScale<T> : 0x1p-25;
      const double relative = with_lo ? unit * unit + 0x1p-23 : unit + 0x1p-23;
      difference = kernels::compare("t", row, j, high + (with_lo ? low / kLoScale<T> : 0), t,
                                    relative * std::fabs(t) + floor + (with_s ? 0 : 2 * error));
      if (!difference.empty()) return difference;
      if (!with_lo && low != unwritten) return "lo was written";
      if (with_s && kernels::to_double(again[at]) != high)
        return emulator::format("t[%d, %d] from the saved s is %g", row, j,
                                kernels::to_double(again[at]));
    }
  }
  return "";
}

#define VARIANT(name, ...) {#name, run_shrink<__VA_ARGS__>},
const std::vector<kernels::Variant> kVariants = {LORA_GROUPED_SHRINK_VARIANTS(VARIANT)};

}  // namespace
}  // namespace lora_ext::kernel

int main(int argc, char** argv) {
  return kernels::variants_main(argc, argv, "lora_grouped_shrink",
                                {{"even", 256, 4, 256},
                                 {"odd", 131, 3, 435},
                                 {"one_each", 40, 50, 61},
                                 {"one", 200, 1, 200},
                                 {"tiny", 1, 2, 5}},
                                lora_ext::kernel::kVariants);
}
