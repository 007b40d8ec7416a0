// Runs lora_gemm_fused_shrink_sm90a on odd sizes, ranks and pitches, with one cluster resident and
// with many, before a grid that starts beside it and reads T.
#include "emulated/kernels/lora_gemm_fused_shrink_sm90a.h"

#include "emulated/kernels/driver.h"
#include "emulated/kernels/launch.h"
#include "emulated/kernels/neighbours.h"
#include "emulated/kernels/operand.h"

namespace kernels {
namespace {

constexpr float kBetweenRows = -12345;

template <class T, bool kMNMajor, bool kMasked>
struct Problem {
  using Operand = VectorOperand<T>;

  const int m, n, k;
  Random random;
  const Numbers numbers = random() % 2 ? Numbers::Integers : Numbers::Reals;
  const bool exact = numbers == Numbers::Integers;
  const int rank = 1 + static_cast<int>(random() % 64);
  const int width = padded(rank), t_pitch = width + 8;
  const float scaling = exact ? 0.5f : 1.7f;
  const bool with_bias = !kMasked && random() % 2 != 0, with_s = random() % 2 != 0;
  const bool trigger_dependents = random() % 4 != 0;
  const Operand p{m, k, numbers, random, "p"};
  const Operand q = right(n, k, "q"), a = right(rank, k, "a"), u = right(n, rank, "u");
  const Matrix<float> bias = random_matrix<float>(1, n, n, numbers, random);
  const GlobalBuffer<float> bias_buffer{bias.values, "bias"};
  const RandomMask mask{numbers, random};
  const WrittenRows<T> t{m, t_pitch, false, from_double<T>(kBetweenRows), "t"};
  const WrittenRows<float> s{m, rank, false, kBetweenRows, "s"};
  const WrittenRows<T> y{m, padded(n) + 8, false, from_double<T>(kBetweenRows), "y"};

  explicit Problem(const Case& run)
      : m(run.size.m), n(run.size.n), k(run.size.k), random(run.seed) {}

  Operand right(int columns, int depth, const char* name) {
    return kMNMajor ? Operand(depth, columns, numbers, random, name)
                    : Operand(columns, depth, numbers, random, name);
  }
  static double right_at(const Operand& operand, int k, int column) {
    return kMNMajor ? operand.matrix(k, column) : operand.matrix(column, k);
  }

  LoraGemmParams<T> params() const {
    LoraGemmParams<T> params{};
    params.p = p.data(), params.q = q.data(), params.y = y.data();
    params.p_pitch = p.pitch(), params.q_pitch = q.pitch(), params.y_pitch = y.pitch();
    params.low_rank[0] = {t.data(), u.data()}, params.t_pitch = t_pitch, params.u_pitch = u.pitch();
    params.bias = with_bias ? bias_buffer.data() : nullptr, params.float_bias = true;
    params.m = m, params.n = n, params.k = k, params.rank = rank, params.terms = 1;
    params.mask = mask.parameters(), params.trigger_dependents = trigger_dependents;
    return params;
  }

  // Checks S, T against the stored S, and Y against the stored T: each rounding counts once.
  void check() const {
    for (int i = 0; i < m; ++i) {
      for (int j = 0; j < t_pitch; ++j) check_t(i, j);
      for (int j = 0; j < y.width(); ++j) check_y(i, j);
    }
  }

  void check_t(int i, int j) const {
    if (j >= width)
      return compare("t's padding", i, j, t(i, j), to_double(from_double<T>(kBetweenRows)), 0);
    Bounded sum;
    for (int l = 0; l < k && j < rank; ++l) sum.add(p.matrix(i, l) * right_at(a, l, j));
    if (j < rank) {
      const double expected = with_s ? sum.value : kBetweenRows;
      compare("s", i, j, s(i, j), expected, exact || !with_s ? 0 : sum.error());
    }
    sum.value *= scaling, sum.magnitude *= scaling;
    compare_rounded("t", i, j, t(i, j), sum, exact);
  }

  void check_y(int i, int j) const {
    if (j >= n) {  // TMA stores whole chunks of 16 bytes
      const double expected = j < padded(n) ? 0 : to_double(from_double<T>(kBetweenRows));
      return compare("y's padding", i, j, y(i, j), expected, 0);
    }
    Bounded sum;
    for (int l = 0; l < k; ++l) sum.add(p.matrix(i, l) * right_at(q, l, j));
    const double factor = kMasked ? mask.factor(i, j) : 1;
    for (int l = 0; l < rank; ++l) sum.add(factor * to_double(t(i, l)) * right_at(u, l, j));
    if (with_bias) sum.add(bias(0, j));
    compare_rounded("y", i, j, y(i, j), sum, exact);
  }
};

// In addition to the reads of lora_gemm_sm90a: P once more, and A once per pair of row blocks.
template <class Tile>
void compare_loads(int64_t m, int64_t n, int64_t k, int64_t rank) {
  const int64_t pairs = (m + Tile::kPairM - 1) / Tile::kPairM,
                column_tiles = (n + Tile::kN - 1) / Tile::kN;
  compare_count("bytes loaded", counted_bytes(emulator::GlobalAccess::TmaLoad),
                2 * ((column_tiles * m + pairs * n) * (k + rank) + (m + pairs * rank) * k));
}

template <class T, bool kMNMajor, bool kMasked>
void run_gemm(const Case& run) {
  using Tile = LoraGemmSm90aTile128x256;
  Problem<T, kMNMajor, kMasked> problem(run);
  const LoraGemmParams<T> params = problem.params();
  const auto flags = static_cast<size_t>(2 * ((problem.m + Tile::kPairM - 1) / Tile::kPairM));
  GlobalBuffer<uint32_t> ready(std::vector<uint32_t>(flags), "ready"),
      ticket(std::vector<uint32_t>(1), "ticket"), zero(std::vector<uint32_t>(1), "zero"),
      written(1, "written");
  const LoraFusedShrinkParams<T> in{.t = problem.t.data(),
                                    .s = problem.with_s ? problem.s.data() : nullptr,
                                    .t_pitch = problem.t_pitch,
                                    .width = problem.width,
                                    .scaling = problem.scaling,
                                    .ticket = ticket.data(),
                                    .ready = ready.data(),
                                    .written = written.data()};

  emulator::Stream stream;
  // Two grids later, it is read beside the kernel.
  stream.launch({.grid = dim3(1), .block = dim3(32)}, copy<uint32_t>,
                static_cast<const uint32_t*>(zero.data()), written.data(), 1);
  const auto pairs = static_cast<uint64_t>(pairs_of_tiles<Tile>(params));
  Launch launch{stream, 1 + static_cast<int64_t>(problem.random() % (pairs + 1))};
  launch_lora_gemm_fused_shrink_sm90a<T>(
      params, in, {problem.a.data(), problem.a.pitch()},
      {plan::Tile::kFusedShrink128x256, kMNMajor, kMasked, false}, launch);
  const WrittenRows<T> seen_t(problem.m, problem.t_pitch, false, {}, "t as the next grid sees it");
  stream.launch({.grid = dim3(2), .block = dim3(128), .programmatic_dependent = true},
                copy_early<T>, static_cast<const T*>(problem.t.data()), seen_t.data(),
                problem.m * problem.t_pitch, static_cast<const uint32_t*>(written.data()),
                parts_of_t(static_cast<uint32_t>(flags)));
  run_timed(stream);

  compare_loads<Tile>(problem.m, problem.n, problem.k, problem.rank);
  problem.check();
  for (int i = 0; i < problem.m; ++i)
    for (int j = 0; j < problem.t_pitch; ++j)
      compare("t as the next grid sees it", i, j, seen_t(i, j), to_double(problem.t(i, j)), 0);
}

}  // namespace

#define VARIANT(name, ...) {#name, run_gemm<__VA_ARGS__>},
const Program program{"lora_gemm_fused_shrink_sm90a",
                      {LORA_GEMM_FUSED_SHRINK_SM90A_VARIANTS(VARIANT)},
                      {{"even", 256, 256, 128},
                       {"odd", 131, 77, 99},
                       {"wide", 70, 600, 200},
                       {"tall", 1200, 65, 40},
                       {"tiles", 520, 270, 130},
                       {"deep", 40, 24, 700},
                       {"tiny", 3, 1, 5}}};

}  // namespace kernels
