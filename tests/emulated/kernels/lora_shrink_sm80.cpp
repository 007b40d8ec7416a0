// Runs lora_shrink_sm80 and lora_reduce on odd sizes, with one or two terms and up to seven splits,
// before a grid that starts beside lora_reduce and reads Z, too.
#include "emulated/kernels/lora_shrink_sm80.h"

#include "emulated/kernels/driver.h"
#include "emulated/kernels/neighbours.h"
#include "emulated/kernels/operand.h"

namespace kernels {
namespace {

constexpr float kBetweenRows = -12345;

template <class T, bool kMNMajor, bool kMasked, Alignment kAlignment>
void run_shrink(const Case& run) {
  const auto [name, m, rank, k] = run.size;
  Random random(run.seed);
  const Numbers numbers = random() % 2 ? Numbers::Integers : Numbers::Reals;
  const int terms = 1 + static_cast<int>(random() % 2), width = padded(rank);
  const int lo_column = random() % 2 ? rank : width, columns = terms * lo_column;
  const Operand<T, kAlignment> x(m, k, numbers, random, "x");
  const Operand<T, kAlignment> a(kMNMajor ? k : columns, kMNMajor ? columns : k, numbers, random,
                                 "a");
  const RandomMask mask(numbers, random);
  // The small one leads half below its smallest normal number.
  const float scaling = numbers == Numbers::Integers ? 0.5f : random() % 2 ? 1.7f : 1.7e-5f;

  const int steps = (k + 63) / 64;
  const int steps_per_split = 1 + static_cast<int>(random() % steps);
  const int splits = (steps + steps_per_split - 1) / steps_per_split;
  GlobalBuffer<float> z(static_cast<size_t>(splits) * m * columns, "z");
  const int t_pitch = width + 3;
  const bool with_s = random() % 4, with_lo = random() % 2;
  const auto unwritten = from_double<T>(kBetweenRows);
  const WrittenRows<float> s(m, rank, false, kBetweenRows, "s");
  const WrittenRows<T> hi(m, t_pitch, false, unwritten, "hi"),
      lo(m, t_pitch, false, unwritten, "lo");

  LoraShrinkParams<T> shrink{};
  shrink.x = x.data(), shrink.a = a.data(), shrink.z = z.data();
  shrink.x_pitch = x.pitch(), shrink.a_pitch = a.pitch();
  shrink.m = m, shrink.k = k, shrink.columns = columns;
  shrink.steps_per_split = steps_per_split;
  shrink.mask = mask.parameters();
  LoraReduceParams<T> reduce{};
  reduce.z = z.data(), reduce.s = with_s ? s.data() : nullptr, reduce.t[0] = hi.data();
  reduce.t[1] = with_lo ? lo.data() : nullptr;
  reduce.t_pitch = t_pitch, reduce.m = m, reduce.rank = rank;
  reduce.splits = splits, reduce.terms = terms;
  reduce.z_pitch = columns, reduce.lo_column = lo_column, reduce.width = width;
  reduce.keep_scale = kMasked ? mask.keep_scale : 1.f, reduce.scaling = scaling;

  using Tile = LoraShrinkTile;
  emulator::Stream stream;
  stream.launch({.grid = dim3(blocks_of(m, Tile::kM), blocks_of(columns, Tile::kN),
                              static_cast<unsigned>(splits)),
                 .block = dim3(Tile::kThreads),
                 .shared_bytes = Tile::kSlabs},
                lora_shrink_sm80<T, kMNMajor, kMasked, kAlignment>, shrink);
  stream.launch({.grid = dim3(1 + static_cast<unsigned>(random() % 3)), .block = dim3(256)},
                lora_reduce<T>, reduce);
  GlobalBuffer<float> seen_z(z.size(), "z as the next grid sees it");
  stream.launch({.grid = dim3(2), .block = dim3(128), .programmatic_dependent = true},
                copy_early<float>, static_cast<const float*>(z.data()), seen_z.data(),
                static_cast<int>(z.size()));
  run_timed(stream);

  for (size_t i = 0; i < z.size(); ++i)
    compare("z as the next grid sees it", 0, static_cast<int>(i), seen_z[i], z[i], 0);
  const double between = to_double(unwritten);
  for (int i = 0; i < m; ++i) {
    for (int j = 0; j < t_pitch; ++j) {
      if (!with_lo) compare("lo", i, j, lo(i, j), between, 0);
      if (j >= rank) {  // zero up to the width, then unchanged
        const double expected = j < width ? 0 : between;
        compare("hi", i, j, hi(i, j), expected, 0);
        if (with_lo) compare("lo", i, j, lo(i, j), expected, 0);
        continue;
      }
      Bounded expected;
      for (int l = 0; l < k; ++l) {
        const double factor = kMasked ? mask.factor(i, l) : 1;
        for (int term = 0; term < terms; ++term) {
          const int column = term * lo_column + j;
          const double right = kMNMajor ? a.matrix(l, column) : a.matrix(column, l);
          expected.add((term ? 1 / kLoScale<T> : 1) * factor * x.matrix(i, l) * right);
        }
      }
      const double error = numbers == Numbers::Integers ? 0 : expected.error();
      compare("s", i, j, s(i, j), with_s ? expected.value : kBetweenRows, with_s ? error : 0);
      compare_halves("t", i, j, hi(i, j), lo(i, j), with_lo,
                     scaling * (with_s ? s(i, j) : expected.value), with_s ? 0 : scaling * error);
    }
  }
}

}  // namespace

#define VARIANT(name, ...) {#name, run_shrink<__VA_ARGS__>},
const Program program{"lora_shrink_sm80",
                      {LORA_SHRINK_SM80_VARIANTS(VARIANT)},
                      {{"even", 128, 16, 512},
                       {"odd", 131, 17, 435},
                       {"wide", 66, 129, 200},
                       {"shallow", 65, 8, 61},
                       {"tiny", 3, 1, 5}}};

}  // namespace kernels
