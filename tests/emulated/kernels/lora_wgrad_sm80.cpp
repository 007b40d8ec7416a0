// Runs lora_wgrad_sm80 and lora_reduce_wgrad on odd sizes: one product or two of unequal width, one
// or two terms, any number of splits. U is written by a grid that has ended before the product
// beside which lora_wgrad starts, and on which the grids after it depend, too.
#include "emulated/kernels/lora_wgrad_sm80.h"

#include <deque>

#include "emulated/kernels/driver.h"
#include "emulated/kernels/gradient.h"
#include "emulated/kernels/neighbours.h"

namespace kernels {
namespace {

template <class T, bool kMasked, Alignment kAlignment>
void run_wgrad(const Case& run) {
  const auto [name, m, rank, c] = run.size;
  Random random(run.seed);
  const Numbers numbers = random() % 2 ? Numbers::Integers : Numbers::Reals;
  const int products = 1 + static_cast<int>(random() % 2);
  const int terms = 1 + static_cast<int>(random() % 2), width = padded(rank);
  const int columns = terms * width;
  const RandomMask mask(numbers, random);
  constexpr bool kUsesPdl = kAlignment == Alignment::kVector;
  constexpr int kOffset = Layout<kAlignment>::kOffset;

  LoraWgradParams<T> params{};
  LoraReduceWgradParams sums{};
  params.m = m, params.mask = mask.parameters();
  std::deque<Operand<T, kAlignment>> p, u;
  std::deque<GlobalBuffer<T>> written_u;
  GlobalBuffer<float> y(600, "y"), seen_y(600, "y as the last grid sees it");
  const int size = static_cast<int>(y.size());
  std::deque<GlobalBuffer<float>> partial;
  std::deque<Gradient<T>> gradient;
  int widest = 0, splits = 0;
  for (int i = 0; i < products; ++i) {
    // The second is wider or narrower than the first, and never masked: dY beside X.
    const int width_c = i == 0 ? c : 1 + static_cast<int>(random() % (2 * c));
    const int steps = (m + 63) / 64, per_split = 1 + static_cast<int>(random() % steps);
    const int here = (steps + per_split - 1) / per_split;
    p.emplace_back(m, width_c, numbers, random, "p");
    u.emplace_back(m, columns, numbers, random, "source of u", false);
    written_u.emplace_back(kOffset + u[i].matrix.values.size(), "u");
    partial.emplace_back(static_cast<size_t>(here) * columns * width_c, "partial sums");
    gradient.emplace_back(rank, width_c, random);
    LoraWgradProduct<T>& product = params.product[i];
    product.p = p[i].data(), product.u = written_u[i].data() + kOffset,
    product.g = partial[i].data();
    product.p_pitch = p[i].pitch(), product.u_pitch = u[i].pitch();
    product.c = width_c, product.columns = columns, product.masked = i == 0;
    product.splits = here, product.steps_per_split = per_split;
    const float scale = numbers == Numbers::Integers ? 0.5f : 1.3f;
    sums.gradient[i] = gradient[i].reduce(partial[i].data(), here, terms, columns, width, scale);
    widest = std::max(widest, width_c), splits += here;
  }

  using Tile = LoraWgradTile;
  emulator::Stream stream;
  for (int i = 0; i < products; ++i) {
    stream.launch({.grid = dim3(2), .block = dim3(64)}, copy<T>, u[i].data(),
                  written_u[i].data() + kOffset, static_cast<int>(u[i].matrix.values.size()));
  }
  stream.launch({.grid = dim3(2), .block = dim3(64), .programmatic_dependent = random() % 2 != 0},
                make_product<float>, y.data(), size);
  stream.launch({.grid = dim3(blocks_of(widest, Tile::kC), blocks_of(columns, Tile::kColumns),
                              static_cast<unsigned>(splits)),
                 .block = dim3(Tile::kThreads),
                 .shared_bytes = Tile::kSharedBytes,
                 .programmatic_dependent = kUsesPdl && random() % 4 != 0},
                lora_wgrad_sm80<T, kMasked, kAlignment>, params);
  stream.launch(
      {.grid = dim3(1 + static_cast<unsigned>(random() % 3), static_cast<unsigned>(products)),
       .block = dim3(256)},
      lora_reduce_wgrad<T>, sums);
  stream.launch({.grid = dim3(2), .block = dim3(64)}, copy<float>,
                static_cast<const float*>(y.data()), seen_y.data(), size);
  run_timed(stream);

  for (size_t i = 0; i < y.size(); ++i)
    compare("y as the last grid sees it", 0, static_cast<int>(i), seen_y[i], 1.0, 0);
  for (int i = 0; i < products; ++i) {
    const std::string name = emulator::format("gradient %d", i);
    gradient[i].compare(name.c_str(), numbers, [&](int r, int column) {
      Bounded expected;
      for (int row = 0; row < m; ++row) {
        const double factor = kMasked && i == 0 ? (mask.reference.kept(row, column) ? 1 : 0) : 1;
        for (int term = 0; term < terms; ++term)
          expected.add(sums.gradient[i].scale * (term ? 1 / kLoScale<T> : 1) * factor *
                       p[i].matrix(row, column) * u[i].matrix(row, term * width + r));
      }
      return expected;
    });
  }
}

}  // namespace

#define VARIANT(name, ...) {#name, run_wgrad<__VA_ARGS__>},
const Program program{"lora_wgrad_sm80",
                      {LORA_WGRAD_SM80_VARIANTS(VARIANT)},
                      {{"even", 512, 16, 128},
                       {"odd", 435, 17, 131},
                       {"wide", 200, 65, 129},
                       {"shallow", 61, 8, 65},
                       {"tiny", 5, 1, 3}}};

}  // namespace kernels
