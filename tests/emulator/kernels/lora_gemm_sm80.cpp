// Runs lora_gemm_sm80 on odd sizes, ranks and pitches, with one or three low-rank terms.
#include "emulator/kernels/lora_gemm_sm80.h"

#include "emulator/counts/counters.h"
#include "emulator/emulator.h"
#include "emulator/kernels/operand.h"
#include "emulator/kernels/variants.h"
#include "kernel/halves.h"

namespace lora_ext::kernel {

#define EXTERN_INSTANCE(variant, ...) extern LORA_GEMM_SM80_INSTANCE(__VA_ARGS__);
LORA_GEMM_SM80_VARIANTS(EXTERN_INSTANCE)

namespace {

using emulator::GlobalBuffer;
using emulator::PlantedFault;
using kernels::Layout;
using kernels::Operand;
using kernels::RandomMask;
using specimens::Bounded;
using specimens::Case;
using specimens::Numbers;

constexpr int kRanks[] = {1, 8, 16, 24, 64, 65, 130, 257};
constexpr double kBetweenRows = -12345;

// What lies past the rank is not multiplied, beyond the 16 of an mma, and each tile of Y asks once
// for its rows of P and T and its columns of Q and U. "" or what differs.
template <class Tile, Alignment kAlignment>
std::string compare_counters(int64_t m, int64_t n, int64_t k, int64_t rank, int64_t terms) {
  const int64_t row_tiles = (m + Tile::kM - 1) / Tile::kM,
                column_tiles = (n + Tile::kN - 1) / Tile::kN;
  const int64_t k16_steps = (k + 63) / 64 * 4 + terms * ((rank + 15) / 16);
  const int64_t flop = 2 * row_tiles * column_tiles * Tile::kM * Tile::kN * 16 * k16_steps;
  const int64_t bytes = (column_tiles * m + row_tiles * n) * (k + terms * rank) * 2;
  const emulator::Counters counted = emulator::counters();
  const auto copied = counted.global_bytes[static_cast<int>(emulator::GlobalAccess::CpAsync)];
  const bool all_copied =
      kAlignment == Alignment::kElement || copied == static_cast<uint64_t>(bytes);
  if (counted.mma_flop == static_cast<uint64_t>(flop) && all_copied) return "";
  return emulator::format(
      "expected %lld operations of tensor cores and %lld bytes, counted %llu and %llu",
      static_cast<long long>(flop), static_cast<long long>(bytes),
      static_cast<unsigned long long>(counted.mma_flop), static_cast<unsigned long long>(copied));
}

template <class T, class Tile, bool kMNMajor, bool kMasked, Alignment kAlignment>
std::string run_gemm(const Case& run) {
  const auto [name, m, n, depth] = run.size;
  std::mt19937_64 random(run.seed);
  const Numbers numbers = random() % 2 ? Numbers::Integers : Numbers::Reals;
  const int k = random() % 6 == 0 ? 0 : depth;  // the low-rank product alone
  const int rank = kRanks[random() % std::size(kRanks)];
  const int terms = random() % 3 == 0 ? 3 : 1;
  const bool with_bias = !kMasked && random() % 4 != 0;
  const auto operand = [&](int rows, int columns, const char* what, bool may_be_far) {
    return std::make_unique<Operand<T, kAlignment>>(rows, columns, numbers, random, what,
                                                    may_be_far);
  };
  const auto right = [&](int depth, const char* what, bool may_be_far) {
    return kMNMajor ? operand(depth, n, what, may_be_far) : operand(n, depth, what, may_be_far);
  };

  const auto p = operand(m, depth, "p", true), q = right(depth, "q", true);
  std::unique_ptr<Operand<T, kAlignment>> t[3], u[3];
  for (int i = 0; i < terms; ++i) {
    t[i] = operand(m, rank, "t", false);  // of one pitch
    u[i] = right(rank, "u", false);
  }
  const bool float_bias = random() % 2;
  const auto bias = specimens::random_matrix<T>(1, n, n, numbers, random);
  const std::vector<float> widened(bias.values.begin(), bias.values.end());
  const GlobalBuffer<T> bias_buffer(bias.values, "bias");
  const GlobalBuffer<float> float_bias_buffer(widened, "bias in float");
  const int y_pitch = Layout<kAlignment>::pitch(n) + 8, y_offset = Layout<kAlignment>::kOffset;
  GlobalBuffer<T> y(y_offset + static_cast<size_t>(m) * y_pitch, "y");
  y.fill(specimens::from_double<T>(kBetweenRows));

  const RandomMask mask(numbers, random);

  LoraGemmParams<T> params{};
  if (k > 0) params.p = p->data(), params.q = q->data();
  params.y = y.data() + y_offset;
  params.p_pitch = p->pitch(), params.q_pitch = q->pitch(), params.y_pitch = y_pitch;
  params.t_pitch = t[0]->pitch(), params.u_pitch = u[0]->pitch();
  for (int i = 0; i < terms; ++i) params.low_rank[i] = {t[i]->data(), u[i]->data()};
  if (with_bias) {
    params.bias = float_bias ? static_cast<const void*>(float_bias_buffer.data())
                             : static_cast<const void*>(bias_buffer.data());
  }
  params.float_bias = float_bias;
  params.m = m, params.n = n, params.k = k, params.rank = rank, params.terms = terms;
  params.mask = mask.parameters();

  const int tiles = ((m + Tile::kM - 1) / Tile::kM) * ((n + Tile::kN - 1) / Tile::kN);
  const int blocks = 1 + static_cast<int>(random() % tiles);  // fewer blocks walk over more tiles
  emulator::Stream stream;
  stream.launch({.grid = dim3(static_cast<unsigned>(blocks)),
                 .block = dim3(Tile::kThreads),
                 .shared_bytes = Tile::kSharedBytes},
                lora_gemm_sm80<T, Tile, kMNMajor, kMasked, kAlignment, PlantedFault>, params);
  emulator::reset_counters();
  specimens::run_timed(stream);

  const std::string counted = compare_counters<Tile, kAlignment>(m, n, k, rank, terms);
  if (!counted.empty()) return counted;

  for (int i = 0; i < m; ++i) {
    for (int j = 0; j < y_pitch; ++j) {
      Bounded expected;
      if (j < n) {
        for (int l = 0; l < k; ++l)
          expected.add(p->matrix(i, l) * (kMNMajor ? q->matrix(l, j) : q->matrix(j, l)));
        for (int term = 0; term < terms; ++term) {
          const double scale = term < terms - 1 ? 1.0 / kLoScale<T> : 1.0;  // lo comes first
          const double factor = scale * (kMasked ? mask.factor(i, j) : 1);
          const auto &left = t[term]->matrix, &factors = u[term]->matrix;
          for (int l = 0; l < rank; ++l)
            expected.add(factor * left(i, l) * (kMNMajor ? factors(l, j) : factors(j, l)));
        }
        if (with_bias) expected.add(bias(0, j));
      } else {
        expected.value = kBetweenRows;  // between the rows nothing is written
      }
      const double rounded = specimens::to_double(specimens::from_double<T>(expected.value));
      const T got = y[y_offset + static_cast<size_t>(i) * y_pitch + static_cast<size_t>(j)];
      const bool exact = numbers == Numbers::Integers || j >= n;
      const std::string difference = specimens::compare(
          "y", i, j, got, exact ? rounded : expected.value,
          exact ? 0
                : expected.error() + specimens::rounding_unit<T>() *
                                         (std::fabs(expected.value) + expected.error()));
      if (!difference.empty()) return difference;
    }
  }
  return "";
}

#define VARIANT(name, ...) {#name, run_gemm<__VA_ARGS__>},
const std::vector<kernels::Variant> kVariants = {LORA_GEMM_SM80_VARIANTS(VARIANT)};

}  // namespace
}  // namespace lora_ext::kernel

int main(int argc, char** argv) {
  return kernels::variants_main(argc, argv, "lora_gemm_sm80",
                                {{"even", 256, 128, 128},
                                 {"odd", 131, 77, 99},
                                 {"shallow", 130, 70, 61},
                                 {"tall", 1200, 65, 72},
                                 {"wide", 70, 300, 200},
                                 {"tiny", 3, 1, 5}},
                                lora_ext::kernel::kVariants);
}
