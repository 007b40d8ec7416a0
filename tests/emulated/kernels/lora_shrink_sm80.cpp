// Runs lora_shrink_sm80 and lora_reduce on odd sizes, with one or two terms and up to seven splits.
#include "emulated/kernels/lora_shrink_sm80.h"

#include "emulated/kernels/operand.h"
#include "emulated/kernels/variants.h"
#include "emulator/emulator.h"

namespace lora_ext::kernel {

#define EXTERN_INSTANCE(variant, ...) extern LORA_SHRINK_SM80_INSTANCE(__VA_ARGS__);
LORA_SHRINK_SM80_VARIANTS(EXTERN_INSTANCE)
extern LORA_REDUCE_INSTANCE(__nv_bfloat16);
extern LORA_REDUCE_INSTANCE(__half);

namespace {

using emulator::GlobalBuffer;
using kernels::blocks_of;
using kernels::Bounded;
using kernels::Case;
using kernels::Numbers;
using kernels::Operand;
using kernels::RandomMask;

constexpr float kBetweenRows = -12345;

template <class T, bool kMNMajor, bool kMasked, Alignment kAlignment>
std::string run_shrink(const Case& run) {
  const auto [name, m, rank, k] = run.size;
  std::mt19937_64 random(run.seed);
  const Numbers numbers = random() % 2 ? Numbers::Integers : Numbers::Reals;
  const int terms = 1 + static_cast<int>(random() % 2), width = kernels::padded(rank);
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
  GlobalBuffer<float> s(static_cast<size_t>(m) * rank, "s");
  const int t_pitch = width + 3;
  const bool with_s = random() % 4, with_lo = random() % 2;
  GlobalBuffer<T> hi(static_cast<size_t>(m) * t_pitch, "hi"), lo(hi.size(), "lo");
  hi.fill(kernels::from_double<T>(kBetweenRows));
  lo.fill(kernels::from_double<T>(kBetweenRows));
  s.fill(kBetweenRows);

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
  kernels::run_timed(stream);

  const double between = kernels::to_double(kernels::from_double<T>(kBetweenRows));
  for (int i = 0; i < m; ++i) {
    for (int j = 0; j < t_pitch; ++j) {
      const size_t at = static_cast<size_t>(i) * t_pitch + j;
      const double high = kernels::to_double(hi[at]), low = kernels::to_double(lo[at]);
      if (j >= rank) {  // zero, then what was there
        const double expected = j < width ? 0 : between;
        if (high != expected) return emulator::format("hi[%d][%d] is %g", i, j, high);
        if (low != (with_lo ? expected : between))
          return emulator::format("lo[%d][%d] is %g", i, j, low);
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
      const double got = s[static_cast<size_t>(i) * rank + j];
      std::string difference =
          kernels::compare("s", i, j, static_cast<float>(got),
                           with_s ? expected.value : kBetweenRows, with_s ? error : 0);
      if (!difference.empty()) return difference;

      // The halves: one rounding of scaling * S, and of what it leaves.
      if (!with_lo && low != between) return "lo was written";
      const double t = scaling * (with_s ? got : expected.value);
      const double unit = kernels::rounding_unit<T>();
      const double relative = with_lo ? unit * unit + 0x1p-23 : unit + 0x1p-23;
      const double floor = with_lo ? 0x1p-25 / kLoScale<T> : 0x1p-25;
      difference =
          kernels::compare("t", i, j, high + (with_lo ? low / kLoScale<T> : 0), t,
                           relative * std::fabs(t) + floor + (with_s ? 0 : scaling * error));
      if (!difference.empty()) return difference;
    }
  }
  return "";
}

#define VARIANT(name, ...) {#name, run_shrink<__VA_ARGS__>},
const std::vector<kernels::Variant> kVariants = {LORA_SHRINK_SM80_VARIANTS(VARIANT)};

}  // namespace
}  // namespace lora_ext::kernel

int main(int argc, char** argv) {
  return kernels::variants_main(argc, argv, "lora_shrink_sm80",
                                {{"even", 128, 16, 512},
                                 {"odd", 131, 17, 435},
                                 {"wide", 66, 129, 200},
                                 {"shallow", 65, 8, 61},
                                 {"tiny", 3, 1, 5}},
                                lora_ext::kernel::kVariants);
}
