// Runs lora_wgrad_sm80 and lora_reduce_wgrad on odd sizes: one product or two of unequal width, one
// or two terms, any number of splits.
#include "emulator/kernels/lora_wgrad_sm80.h"

#include "emulator/emulator.h"
#include "emulator/kernels/gradient.h"
#include "emulator/kernels/variants.h"

namespace lora_ext::kernel {

#define EXTERN_INSTANCE(variant, ...) extern LORA_WGRAD_SM80_INSTANCE(__VA_ARGS__);
LORA_WGRAD_SM80_VARIANTS(EXTERN_INSTANCE)
extern LORA_REDUCE_WGRAD_INSTANCE(__nv_bfloat16);
extern LORA_REDUCE_WGRAD_INSTANCE(__half);

namespace {

using emulator::GlobalBuffer;
using emulator::PlantedFault;
using kernels::blocks_of;
using kernels::Gradient;
using kernels::Operand;
using kernels::RandomMask;
using specimens::Bounded;
using specimens::Case;
using specimens::Numbers;

template <class T, bool kMasked, Alignment kAlignment>
std::string run_wgrad(const Case& run) {
  const auto [name, m, rank, c] = run.size;
  std::mt19937_64 random(run.seed);
  const Numbers numbers = random() % 2 ? Numbers::Integers : Numbers::Reals;
  const int products = 1 + static_cast<int>(random() % 2);
  const int terms = 1 + static_cast<int>(random() % 2), width = specimens::padded(rank);
  const int columns = terms * width;
  const RandomMask mask(numbers, random);

  LoraWgradParams<T> params{};
  LoraReduceWgradParams sums{};
  params.m = m, params.mask = mask.parameters();
  std::vector<std::unique_ptr<Operand<T, kAlignment>>> p, u;
  std::vector<std::unique_ptr<GlobalBuffer<float>>> partial;
  std::vector<std::unique_ptr<Gradient<T>>> gradient;
  int widest = 0, splits = 0;
  for (int i = 0; i < products; ++i) {
    // The second is wider or narrower than the first, and never masked: dY beside X.
    const int width_c = i == 0 ? c : 1 + static_cast<int>(random() % (2 * c));
    const int steps = (m + 63) / 64, per_split = 1 + static_cast<int>(random() % steps);
    const int here = (steps + per_split - 1) / per_split;
    p.push_back(std::make_unique<Operand<T, kAlignment>>(m, width_c, numbers, random, "p"));
    u.push_back(std::make_unique<Operand<T, kAlignment>>(m, columns, numbers, random, "u"));
    partial.push_back(std::make_unique<GlobalBuffer<float>>(
        static_cast<size_t>(here) * columns * width_c, "partial sums"));
    gradient.push_back(std::make_unique<Gradient<T>>(rank, width_c, random));
    LoraWgradProduct<T>& product = params.product[i];
    product.p = p[i]->data(), product.u = u[i]->data(), product.g = partial[i]->data();
    product.p_pitch = p[i]->pitch(), product.u_pitch = u[i]->pitch();
    product.c = width_c, product.columns = columns, product.masked = i == 0;
    product.splits = here, product.steps_per_split = per_split;
    const float scale = numbers == Numbers::Integers ? 0.5f : 1.3f;
    sums.gradient[i] = gradient[i]->reduce(partial[i]->data(), here, terms, columns, width, scale);
    widest = std::max(widest, width_c), splits += here;
  }

  using Tile = LoraWgradTile;
  emulator::Stream stream;
  stream.launch({.grid = dim3(blocks_of(widest, Tile::kC), blocks_of(columns, Tile::kColumns),
                              static_cast<unsigned>(splits)),
                 .block = dim3(Tile::kThreads),
                 .shared_bytes = Tile::kSharedBytes},
                lora_wgrad_sm80<T, kMasked, kAlignment, PlantedFault>, params);
  stream.launch(
      {.grid = dim3(1 + static_cast<unsigned>(random() % 3), static_cast<unsigned>(products)),
       .block = dim3(256)},
      lora_reduce_wgrad<T, PlantedFault>, sums);
  specimens::run_timed(stream);

  for (int i = 0; i < products; ++i) {
    const std::string difference = gradient[i]->compare(numbers, [&](int r, int column) {
      Bounded expected;
      for (int row = 0; row < m; ++row) {
        const double factor = kMasked && i == 0 ? (mask.reference.kept(row, column) ? 1 : 0) : 1;
        for (int term = 0; term < terms; ++term)
          expected.add(sums.gradient[i].scale * (term ? 1 / kLoScale<T> : 1) * factor *
                       p[i]->matrix(row, column) * u[i]->matrix(row, term * width + r));
      }
      return expected;
    });
    if (!difference.empty()) return emulator::format("product %d: ", i) + difference;
  }
  return "";
}

#define VARIANT(name, ...) {#name, run_wgrad<__VA_ARGS__>},
const std::vector<kernels::Variant> kVariants = {LORA_WGRAD_SM80_VARIANTS(VARIANT)};

}  // namespace
}  // namespace lora_ext::kernel

int main(int argc, char** argv) {
  return kernels::variants_main(argc, argv, "lora_wgrad_sm80",
                                {{"even", 512, 16, 128},
                                 {"odd", 435, 17, 131},
                                 {"wide", 200, 67, 130},
                                 {"shallow", 61, 8, 65},
                                 {"tiny", 5, 1, 3}},
                                lora_ext::kernel::kVariants);
}
