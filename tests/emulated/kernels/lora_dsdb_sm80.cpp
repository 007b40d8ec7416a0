// Runs lora_dsdb_sm80 on odd sizes, with one panel or several, any number of splits, and one or
// both of its results.
#include "emulated/kernels/lora_dsdb_sm80.h"

#include "emulated/kernels/driver.h"
#include "emulated/kernels/operand.h"

namespace kernels {
namespace {

constexpr float kUnwritten = -12345;

template <class T, int kColumns, Alignment kAlignment>
void run_dsdb(const Case& run) {
  const auto [name, m, n, depth] = run.size;
  Random random(run.seed);
  const Numbers numbers = random() % 2 ? Numbers::Integers : Numbers::Reals;
  const int columns = random() % 2 ? kColumns : 1 + static_cast<int>(random() % kColumns);
  const Operand<T, kAlignment> dy(m, n, numbers, random, "dy"), b(n, columns, numbers, random, "b"),
      s(m, columns, numbers, random, "s");
  const bool with_z = random() % 4, with_g = !with_z || random() % 4;

  using Tile = LoraDsdbTile<kColumns>;
  const int steps = (m + Tile::kM - 1) / Tile::kM;
  const int per_split = 1 + static_cast<int>(random() % steps);
  const int splits = (steps + per_split - 1) / per_split;
  const int panels = (n + Tile::kN - 1) / Tile::kN;
  GlobalBuffer<float> z(static_cast<size_t>(panels) * m * columns, "z");
  GlobalBuffer<float> g(static_cast<size_t>(splits) * columns * n, "g");
  z.fill(kUnwritten), g.fill(kUnwritten);

  LoraDsdbParams<T> params{};
  params.dy = dy.data(), params.b = b.data(), params.s = s.data();
  params.z = with_z ? z.data() : nullptr, params.g = with_g ? g.data() : nullptr;
  params.dy_pitch = dy.pitch(), params.b_pitch = b.pitch(), params.s_pitch = s.pitch();
  params.m = m, params.n = n, params.columns = columns, params.steps_per_split = per_split;
  emulator::Stream stream;
  stream.launch({.grid = dim3(static_cast<unsigned>(panels), static_cast<unsigned>(splits)),
                 .block = dim3(Tile::kThreads),
                 .shared_bytes = Tile::kSharedBytes},
                lora_dsdb_sm80<T, kColumns, kAlignment>, params);
  run_timed(stream);

  const auto check = [&](const char* what, int i, int j, float got, const Bounded& expected,
                         bool written) {
    const double error = !written || numbers == Numbers::Integers ? 0 : expected.error();
    compare(what, i, j, got, written ? expected.value : kUnwritten, error);
  };
  for (int panel = 0; panel < panels; ++panel) {
    for (int i = 0; i < m; ++i) {
      for (int j = 0; j < columns; ++j) {
        Bounded expected;
        for (int l = panel * Tile::kN; l < std::min(n, (panel + 1) * Tile::kN); ++l)
          expected.add(dy.matrix(i, l) * b.matrix(l, j));
        const size_t at = (static_cast<size_t>(panel) * m + i) * columns + j;
        check("z", i, j, z[at], expected, with_z);
      }
    }
  }
  const int rows_per_split = per_split * Tile::kM;
  for (int split = 0; split < splits; ++split) {
    for (int j = 0; j < columns; ++j) {
      for (int l = 0; l < n; ++l) {
        Bounded expected;
        for (int i = split * rows_per_split; i < std::min(m, (split + 1) * rows_per_split); ++i)
          expected.add(dy.matrix(i, l) * s.matrix(i, j));
        const size_t at = (static_cast<size_t>(split) * columns + j) * n + l;
        check("g", l, j, g[at], expected, with_g);
      }
    }
  }
}

}  // namespace

#define VARIANT(name, ...) {#name, run_dsdb<__VA_ARGS__>},
const Program program{"lora_dsdb_sm80",
                      {LORA_DSDB_SM80_VARIANTS(VARIANT)},
                      {{"even", 256, 1024, 32},
                       {"odd", 131, 1101, 32},
                       {"narrow", 200, 70, 32},
                       {"shallow", 61, 300, 32},
                       {"tiny", 3, 1, 32}}};

}  // namespace kernels
