// Runs lora_gemm_in_grid_sm90a on odd sizes, ranks and pitches, with one cluster resident and with
// many, before a grid that begins beside it and reads T.
#include "emulated/kernels/lora_gemm_in_grid_sm90a.h"

#include "emulated/kernels/cluster_launch.h"
#include "emulated/kernels/neighbours.h"
#include "emulated/kernels/operand.h"
#include "emulated/kernels/variants.h"
#include "emulator/counts/counters.h"
#include "kernel/lora_gemm_sm90a/launch.h"

namespace kernels {

extern NEIGHBOUR_COPY_EARLY(__half);
extern NEIGHBOUR_COPY_EARLY(__nv_bfloat16);

}  // namespace kernels

namespace lora_ext::kernel {

#define EXTERN_INSTANCES(variant, ...) \
  LORA_GEMM_IN_GRID_SM90A_INSTANCES(extern template, __VA_ARGS__)
LORA_GEMM_IN_GRID_SM90A_VARIANTS(EXTERN_INSTANCES)

namespace {

using emulator::GlobalBuffer;
using kernels::Bounded;
using kernels::Case;
using kernels::Numbers;
using kernels::RandomMask;

constexpr double kBetweenRows = -12345;

// Whether a stored value is the sum, rounded to its type; "" or the difference.
template <class T>
std::string compare_rounded(const char* name, int row, int column, T got, const Bounded& sum,
                            bool exact) {
  const double error =
      exact ? 0 : sum.error() + kernels::rounding_error<T>(std::fabs(sum.value) + sum.error());
  const double rounded = kernels::to_double(kernels::from_double<T>(sum.value));
  return kernels::compare(name, row, column, got, exact ? rounded : sum.value, error);
}

template <class T, bool kMNMajor, bool kMasked>
struct Problem {
  using Operand = kernels::Operand<T, Alignment::kVector>;

  const int m, n, k;
  std::mt19937_64 random;
  const Numbers numbers = random() % 2 ? Numbers::Integers : Numbers::Reals;
  const bool exact = numbers == Numbers::Integers;
  const int rank = 1 + static_cast<int>(random() % 64);
  const int width = kernels::padded(rank), t_pitch = width + 8, y_pitch = kernels::padded(n) + 8;
  const float scaling = exact ? 0.5f : 1.7f;
  const bool with_bias = !kMasked && random() % 2 != 0, with_s = random() % 2 != 0;
  const bool lets_wgrad_begin = random() % 4 != 0;
  const Operand p{m, k, numbers, random, "p"};
  const Operand q = right(n, k, "q"), a = right(rank, k, "a"), u = right(n, rank, "u");
  const kernels::Matrix<float> bias = kernels::random_matrix<float>(1, n, n, numbers, random);
  const GlobalBuffer<float> bias_buffer{bias.values, "bias"};
  const RandomMask mask{numbers, random};
  GlobalBuffer<T> t{static_cast<size_t>(m) * t_pitch, "t"};
  GlobalBuffer<float> s{static_cast<size_t>(m) * rank, "s"};
  GlobalBuffer<T> y{static_cast<size_t>(m) * y_pitch, "y"};

  explicit Problem(const Case& run)
      : m(run.size.m), n(run.size.n), k(run.size.k), random(run.seed) {
    t.fill(kernels::from_double<T>(kBetweenRows));
    s.fill(static_cast<float>(kBetweenRows));
    y.fill(kernels::from_double<T>(kBetweenRows));
  }

  Operand right(int columns, int depth, const char* name) {
    return kMNMajor ? Operand(depth, columns, numbers, random, name)
                    : Operand(columns, depth, numbers, random, name);
  }
  static double right_at(const Operand& operand, int k, int column) {
    return kMNMajor ? operand.matrix(k, column) : operand.matrix(column, k);
  }

  LoraGemmParams<T> params() {
    LoraGemmParams<T> params{};
    params.p = p.data(), params.q = q.data(), params.y = y.data();
    params.p_pitch = p.pitch(), params.q_pitch = q.pitch(), params.y_pitch = y_pitch;
    params.low_rank[0] = {t.data(), u.data()}, params.t_pitch = t_pitch, params.u_pitch = u.pitch();
    params.bias = with_bias ? bias_buffer.data() : nullptr, params.float_bias = true;
    params.m = m, params.n = n, params.k = k, params.rank = rank, params.terms = 1;
    params.mask = mask.parameters(), params.lets_wgrad_begin = lets_wgrad_begin;
    return params;
  }

  // S, T from the sum that it holds, and Y from T as it was stored: each rounding counts once.
  std::string check() const {
    std::string difference;
    for (int i = 0; i < m && difference.empty(); ++i) {
      for (int j = 0; j < t_pitch && difference.empty(); ++j) difference = check_t(i, j);
      for (int j = 0; j < y_pitch && difference.empty(); ++j) difference = check_y(i, j);
    }
    return difference;
  }

  std::string check_t(int i, int j) const {
    const T got = t[static_cast<size_t>(i) * t_pitch + j];
    Bounded sum;
    if (j >= width) {
      sum.value = kBetweenRows;
      return compare_rounded("t's padding", i, j, got, sum, true);
    }
    for (int l = 0; l < k && j < rank; ++l) sum.add(p.matrix(i, l) * right_at(a, l, j));
    if (j < rank) {
      const float in_float = s[static_cast<size_t>(i) * rank + j];
      const double expected = with_s ? sum.value : kBetweenRows;
      const std::string difference =
          kernels::compare("s", i, j, in_float, expected, exact || !with_s ? 0 : sum.error());
      if (!difference.empty()) return difference;
    }
    sum.value *= scaling, sum.magnitude *= scaling;
    return compare_rounded("t", i, j, got, sum, exact);
  }

  std::string check_y(int i, int j) const {
    const T got = y[static_cast<size_t>(i) * y_pitch + j];
    Bounded sum;
    if (j >= n) {
      sum.value = kBetweenRows;
      return compare_rounded("y's padding", i, j, got, sum, true);
    }
    for (int l = 0; l < k; ++l) sum.add(p.matrix(i, l) * right_at(q, l, j));
    const double factor = kMasked ? mask.factor(i, j) : 1;
    for (int l = 0; l < rank; ++l) {
      const double from_t = kernels::to_double(t[static_cast<size_t>(i) * t_pitch + l]);
      sum.add(factor * from_t * right_at(u, l, j));
    }
    if (with_bias) sum.add(bias(0, j));
    return compare_rounded("y", i, j, got, sum, exact);
  }
};

// Beyond what lora_gemm_sm90a asks for, P once more, and A once for each pair of row blocks. "" or
// what differs.
template <class Tile>
std::string compare_loads(int64_t m, int64_t n, int64_t k, int64_t rank) {
  const int64_t pairs = (m + Tile::kPairM - 1) / Tile::kPairM,
                column_tiles = (n + Tile::kN - 1) / Tile::kN;
  const int64_t expected =
      2 * ((column_tiles * m + pairs * n) * (k + rank) + (m + pairs * rank) * k);
  const emulator::Counters counted = emulator::counters();
  const auto loads =
      static_cast<int64_t>(counted.global_bytes[static_cast<int>(emulator::GlobalAccess::TmaLoad)]);
  if (loads == expected) return "";
  return emulator::format("expected %lld bytes loaded, counted %lld",
                          static_cast<long long>(expected), static_cast<long long>(loads));
}

template <class T, bool kMNMajor, bool kMasked>
std::string run_gemm(const Case& run) {
  using Tile = LoraGemmSm90aTile128x256;
  Problem<T, kMNMajor, kMasked> problem(run);
  const LoraGemmParams<T> params = problem.params();
  const auto flags = static_cast<size_t>(2 * ((problem.m + Tile::kPairM - 1) / Tile::kPairM));
  GlobalBuffer<uint32_t> ready(std::vector<uint32_t>(flags), "ready"),
      ticket(std::vector<uint32_t>(1), "ticket"), written(std::vector<uint32_t>(1), "written");
  const LoraInGridParams<T> in{.t = problem.t.data(),
                               .s = problem.with_s ? problem.s.data() : nullptr,
                               .t_pitch = problem.t_pitch,
                               .width = problem.width,
                               .scaling = problem.scaling,
                               .pairs_per_ticket = 1 + static_cast<int>(problem.random() % 3),
                               .ticket = ticket.data(),
                               .ready = ready.data(),
                               .written = written.data()};

  emulator::Stream stream;
  const auto pairs = static_cast<uint64_t>(pairs_of_tiles<Tile>(params));
  kernels::ClusterLaunch launch{stream, 1 + static_cast<int64_t>(problem.random() % (pairs + 1))};
  launch_lora_gemm_in_grid_sm90a<T>(params, in, {problem.a.data(), problem.a.pitch()},
                                    {plan::Tile::kInGrid128x256, kMNMajor, kMasked, false}, launch);
  GlobalBuffer<T> seen_t(problem.t.size(), "t as the next grid sees it");
  stream.launch({.grid = dim3(2), .block = dim3(128), .programmatic_dependent = true},
                kernels::copy_early<T>, static_cast<const T*>(problem.t.data()), seen_t.data(),
                static_cast<int>(seen_t.size()), static_cast<const uint32_t*>(written.data()),
                parts_of_t(static_cast<uint32_t>(flags)));
  kernels::run_timed(stream);

  std::string difference = compare_loads<Tile>(problem.m, problem.n, problem.k, problem.rank);
  if (difference.empty()) difference = problem.check();
  for (size_t i = 0; i < seen_t.size() && difference.empty(); ++i)
    difference = kernels::compare("t as the next grid sees it", 0, static_cast<int>(i), seen_t[i],
                                  kernels::to_double(problem.t[i]), 0);
  return difference;
}

#define VARIANT(name, ...) {#name, run_gemm<__VA_ARGS__>},
const std::vector<kernels::Variant> kVariants = {LORA_GEMM_IN_GRID_SM90A_VARIANTS(VARIANT)};

}  // namespace
}  // namespace lora_ext::kernel

int main(int argc, char** argv) {
  return kernels::variants_main(argc, argv, "lora_gemm_in_grid_sm90a",
                                {{"even", 256, 256, 128},
                                 {"odd", 131, 77, 99},
                                 {"wide", 70, 600, 200},
                                 {"tall", 1200, 65, 40},
                                 {"tiles", 520, 270, 130},
                                 {"deep", 40, 24, 700},
                                 {"tiny", 3, 1, 5}},
                                lora_ext::kernel::kVariants);
}
