// Runs lora_gemm_sm90a on odd sizes, ranks and pitches, with one or three low-rank terms, behind
// the grid that writes T.
#include "emulator/kernels/lora_gemm_sm90a.h"

#include "emulator/counts/counters.h"
#include "emulator/kernels/cluster_launch.h"
#include "emulator/kernels/operand.h"
#include "emulator/kernels/variants.h"
#include "kernel/halves.h"
#include "kernel/lora_gemm_sm90a_launch.h"

namespace lora_ext::kernel {

#define EXTERN_INSTANCES(variant, ...) LORA_GEMM_SM90A_INSTANCES(extern template, __VA_ARGS__)
LORA_GEMM_SM90A_VARIANTS(EXTERN_INSTANCES)
extern template __global__ void write_t(const __half*, __half*, int);
extern template __global__ void write_t(const __nv_bfloat16*, __nv_bfloat16*, int);

namespace {

using emulator::GlobalBuffer;
using emulator::PlantedFault;
using kernels::Layout;
using kernels::RandomMask;
using specimens::Bounded;
using specimens::Case;
using specimens::Numbers;

template <class T>
using Operand = kernels::Operand<T, Alignment::kVector>;

constexpr double kBetweenRows = -12345;

// What lies past the rank is not multiplied, beyond the last step's 16s, each tile of Y asks once
// for its rows of P and T and each pair of tiles once for their columns of Q and U, rows of slabs
// lie in different banks, and Y is written once. "" or what differs.
template <class Tile>
std::string compare_counters(int64_t m, int64_t n, int64_t k, int64_t rank, int64_t terms) {
  const int64_t pairs = (m + Tile::kPairM - 1) / Tile::kPairM,
                column_tiles = (n + Tile::kN - 1) / Tile::kN;
  const int64_t last = rank % 64 == 0 ? 64 : rank % 64, tail = last <= 16 ? 1 : last <= 32 ? 2 : 4;
  const int64_t k16_steps = (k + 63) / 64 * 4 + terms * ((rank - 1) / 64 * 4 + tail);
  const int64_t flop = 2 * pairs * column_tiles * Tile::kPairM * Tile::kN * 16 * k16_steps;
  const int64_t loaded = (column_tiles * m + pairs * n) * (k + terms * rank) * 2;
  const emulator::Counters counted = emulator::counters();
  const auto bytes = [&](emulator::GlobalAccess kind) {
    return static_cast<int64_t>(counted.global_bytes[static_cast<int>(kind)]);
  };
  const int64_t loads = bytes(emulator::GlobalAccess::TmaLoad),
                stores = bytes(emulator::GlobalAccess::TmaStore);
  if (static_cast<int64_t>(counted.wgmma_flop) == flop && loads == loaded && stores == 2 * m * n &&
      counted.matrix_conflicts == 0)
    return "";
  return emulator::format(
      "expected %lld operations of tensor cores, %lld bytes loaded and %lld stored, counted %lld, "
      "%lld and %lld, and %lld bank conflicts",
      static_cast<long long>(flop), static_cast<long long>(loaded),
      static_cast<long long>(2 * m * n), static_cast<long long>(counted.wgmma_flop),
      static_cast<long long>(loads), static_cast<long long>(stores),
      static_cast<long long>(counted.matrix_conflicts));
}

template <class T, bool kMNMajor, bool kMasked, class Tile, plan::Tile kTile>
std::string run_gemm(const Case& run) {
  const auto [name, m, n, depth] = run.size;
  std::mt19937_64 random(run.seed);
  const Numbers numbers = random() % 2 ? Numbers::Integers : Numbers::Reals;
  const int k = random() % 4 == 0 ? 0 : depth;  // the low-rank product alone
  const int rank = 1 + static_cast<int>(random() % (random() % 2 ? 256 : 64));
  const int terms = random() % 3 == 0 ? 3 : 1;
  const bool with_bias = !kMasked && random() % 4 != 0;
  const auto operand = [&](int rows, int columns, const char* what, bool may_be_far) {
    return std::make_unique<Operand<T>>(rows, columns, numbers, random, what, may_be_far);
  };
  const auto right = [&](int rows, const char* what, bool may_be_far) {
    return kMNMajor ? operand(rows, n, what, may_be_far) : operand(n, rows, what, may_be_far);
  };

  const auto p = operand(m, depth, "p", true), q = right(depth, "q", true);
  std::unique_ptr<Operand<T>> t[3], u[3];
  std::unique_ptr<GlobalBuffer<T>> written_t[3];
  for (int i = 0; i < terms; ++i) {
    t[i] = operand(m, rank, "source of t", false);  // of one pitch
    u[i] = right(rank, "u", false);
    written_t[i] = std::make_unique<GlobalBuffer<T>>(t[i]->matrix.values.size(), "t");
  }
  const bool float_bias = random() % 2;
  const auto bias = specimens::random_matrix<T>(1, n, n, numbers, random);
  const std::vector<float> widened(bias.values.begin(), bias.values.end());
  const GlobalBuffer<T> bias_buffer(bias.values, "bias");
  const GlobalBuffer<float> float_bias_buffer(widened, "bias in float");
  const int y_pitch = specimens::padded(n) + 8;
  GlobalBuffer<T> y(static_cast<size_t>(m) * y_pitch, "y");
  y.fill(specimens::from_double<T>(kBetweenRows));

  const RandomMask mask(numbers, random);

  LoraGemmParams<T> params{};
  if (k > 0) params.p = p->data(), params.q = q->data();
  params.y = y.data();
  params.p_pitch = p->pitch(), params.q_pitch = q->pitch(), params.y_pitch = y_pitch;
  params.t_pitch = t[0]->pitch(), params.u_pitch = u[0]->pitch();
  for (int i = 0; i < terms; ++i) params.low_rank[i] = {written_t[i]->data(), u[i]->data()};
  if (with_bias) {
    params.bias = float_bias ? static_cast<const void*>(float_bias_buffer.data())
                             : static_cast<const void*>(bias_buffer.data());
  }
  params.float_bias = float_bias;
  params.m = m, params.n = n, params.k = k, params.rank = rank, params.terms = terms;
  params.mask = mask.parameters();

  emulator::Stream stream;
  for (int i = 0; i < terms; ++i) {
    const int elements = static_cast<int>(t[i]->matrix.values.size());
    stream.launch({.grid = dim3(2), .block = dim3(128)}, write_t<T>, t[i]->data(),
                  written_t[i]->data(), elements);
  }
  const auto pairs = static_cast<uint64_t>(pairs_of_tiles<Tile>(params));
  kernels::ClusterLaunch launch{
      stream, 1 + static_cast<int64_t>(random() % (pairs + 1))};  // few walk over many
  const bool dependent = random() % 2 != 0;
  launch_lora_gemm_sm90a<T, PlantedFault>(params, {kTile, kMNMajor, kMasked, dependent}, launch);
  emulator::reset_counters();
  specimens::run_timed(stream);

  const std::string counted = compare_counters<Tile>(m, n, k, rank, terms);
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
      const T got = y[static_cast<size_t>(i) * y_pitch + static_cast<size_t>(j)];
      const bool exact = numbers == Numbers::Integers || j >= n;
      const std::string difference = specimens::compare(
          "y", i, j, got, exact ? rounded : expected.value,
          exact ? 0
                : expected.error() +
                      specimens::rounding_error<T>(std::fabs(expected.value) + expected.error()));
      if (!difference.empty()) return difference;
    }
  }
  return "";
}

#define VARIANT(name, T, mn_major, masked, tile, planned) \
  {#name, run_gemm<T, mn_major, masked, LoraGemmSm90aTile##tile, plan::Tile::planned>},
const std::vector<kernels::Variant> kVariants = {LORA_GEMM_SM90A_VARIANTS(VARIANT)};

}  // namespace
}  // namespace lora_ext::kernel

int main(int argc, char** argv) {
  return kernels::variants_main(argc, argv, "lora_gemm_sm90a",
                                {{"even", 256, 256, 128},
                                 {"odd", 131, 77, 99},
                                 {"wide", 70, 600, 200},
                                 {"tall", 2310, 264, 24},
                                 {"tiles", 520, 270, 130},
                                 {"deep", 40, 24, 700},
                                 {"tiny", 3, 1, 5}},
                                lora_ext::kernel::kVariants);
}
