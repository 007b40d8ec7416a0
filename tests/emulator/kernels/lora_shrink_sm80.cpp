// Runs lora_shrink_sm80 and lora_reduce on odd sizes, with one or two terms and up to seven splits.
#include "emulator/kernels/lora_shrink_sm80.h"

#include "emulator/emulator.h"
#include "emulator/kernels/operand.h"
#include "emulator/specimens/driver.h"

namespace lora_ext::kernel {

#define EXTERN_INSTANCE(variant, ...) extern LORA_SHRINK_SM80_INSTANCE(__VA_ARGS__);
LORA_SHRINK_SM80_VARIANTS(EXTERN_INSTANCE)
extern LORA_REDUCE_INSTANCE(__nv_bfloat16);
extern LORA_REDUCE_INSTANCE(__half);

namespace {

using emulator::GlobalBuffer;
using emulator::PlantedFault;
using kernels::Operand;
using kernels::RandomMask;
using specimens::Bounded;
using specimens::Case;
using specimens::Numbers;

constexpr float kBetweenRows = -12345;

template <class T, bool kMasked, Alignment kAlignment>
std::string run_shrink(const Case& run) {
  const auto [name, m, rank, k] = run.size;
  std::mt19937_64 random(run.seed);
  const Numbers numbers = random() % 2 ? Numbers::Integers : Numbers::Reals;
  const int terms = 1 + static_cast<int>(random() % 2), columns = terms * rank;
  const Operand<T, kAlignment> x(m, k, numbers, random, "x"), a(columns, k, numbers, random, "a");
  const RandomMask mask(numbers, random);
  const float scaling = numbers == Numbers::Integers ? 0.5f : 1.7f;

  const int steps = (k + 63) / 64;
  const int steps_per_split = 1 + static_cast<int>(random() % steps);
  const int splits = (steps + steps_per_split - 1) / steps_per_split;
  GlobalBuffer<float> z(static_cast<size_t>(splits) * m * columns, "z");
  GlobalBuffer<float> s(static_cast<size_t>(m) * rank, "s");
  const int t_pitch = rank + 3;
  const bool with_lo = random() % 2;
  GlobalBuffer<T> hi(static_cast<size_t>(m) * t_pitch, "hi"), lo(hi.size(), "lo");
  hi.fill(specimens::from_double<T>(kBetweenRows)),
      lo.fill(specimens::from_double<T>(kBetweenRows));

  LoraShrinkParams<T> shrink{};
  shrink.x = x.data(), shrink.a = a.data(), shrink.z = z.data();
  shrink.x_pitch = x.pitch(), shrink.a_pitch = a.pitch();
  shrink.m = m, shrink.k = k, shrink.columns = columns;
  shrink.splits = splits, shrink.steps_per_split = steps_per_split;
  shrink.mask = mask.parameters();
  LoraReduceParams<T> reduce{};
  reduce.z = z.data(), reduce.s = s.data(), reduce.t[0] = hi.data();
  reduce.t[1] = with_lo ? lo.data() : nullptr;
  reduce.t_pitch = t_pitch, reduce.m = m, reduce.rank = rank;
  reduce.splits = splits, reduce.terms = terms;
  reduce.keep_scale = kMasked ? mask.keep_scale : 1.f, reduce.scaling = scaling;

  using Tile = LoraShrinkTile;
  const auto blocks_of = [](int count, int size) {
    return static_cast<unsigned>((count + size - 1) / size);
  };
  emulator::Stream stream;
  stream.launch({.grid = dim3(blocks_of(m, Tile::kM), blocks_of(columns, Tile::kN),
                              static_cast<unsigned>(splits)),
                 .block = dim3(Tile::kThreads),
                 .shared_bytes = Tile::kSlabs},
                lora_shrink_sm80<T, kMasked, kAlignment, PlantedFault>, shrink);
  stream.launch({.grid = dim3(1 + static_cast<unsigned>(random() % 3)), .block = dim3(256)},
                lora_reduce<T, PlantedFault>, reduce);
  specimens::run_timed(stream);

  for (int i = 0; i < m; ++i) {
    for (int j = 0; j < rank; ++j) {
      Bounded expected;
      for (int l = 0; l < k; ++l) {
        const double factor = kMasked ? mask.factor(i, l) : 1;
        for (int term = 0; term < terms; ++term)
          expected.add(factor * x.matrix(i, l) * a.matrix(term * rank + j, l));
      }
      const double error = numbers == Numbers::Integers ? 0 : expected.error();
      const float got = s[static_cast<size_t>(i) * rank + j];
      std::string difference = specimens::compare("s", i, j, got, expected.value, error);
      if (!difference.empty()) return difference;

      // The halves against the S that was written: one rounding of scaling * S, then the rest.
      const double t = static_cast<double>(got) * scaling, unit = specimens::rounding_unit<T>();
      const size_t at = static_cast<size_t>(i) * t_pitch + j;
      const double high = specimens::to_double(hi[at]),
                   low = with_lo ? specimens::to_double(lo[at]) : 0;
      const double left = with_lo ? unit * unit + 0x1p-22 : unit;
      difference = specimens::compare("t", i, j, high + low, t, left * std::fabs(t) + 0x1p-24);
      if (!difference.empty()) return difference;
      if (!with_lo && specimens::to_double(lo[at]) !=
                          specimens::to_double(specimens::from_double<T>(kBetweenRows)))
        return "lo was written";
    }
    for (int j = rank; j < t_pitch; ++j) {
      const T between = hi[static_cast<size_t>(i) * t_pitch + j];
      if (specimens::to_double(between) !=
          specimens::to_double(specimens::from_double<T>(kBetweenRows)))
        return "hi was written between its rows";
    }
  }
  return "";
}

std::string run_variant(const Case& run) {
#define RUN(name, ...) \
  if (run.variant == #name) return run_shrink<__VA_ARGS__>(run);
  LORA_SHRINK_SM80_VARIANTS(RUN)
  return "no such variant";
}

}  // namespace
}  // namespace lora_ext::kernel

int main(int argc, char** argv) {
  using lora_ext::kernel::run_variant;
#define NAME(variant, ...) #variant,
  return specimens::specimen_main(argc, argv,
                                  {.name = "lora_shrink_sm80",
                                   .sizes = {{"even", 128, 16, 512},
                                             {"odd", 131, 17, 435},
                                             {"wide", 66, 129, 200},
                                             {"shallow", 65, 8, 61},
                                             {"tiny", 3, 1, 5}},
                                   .variants = {LORA_SHRINK_SM80_VARIANTS(NAME)},
                                   .run = run_variant,
                                   .flops = specimens::gemm_flops});
}
