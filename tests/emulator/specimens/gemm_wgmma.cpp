// Runs the clustered GEMM of gemm_wgmma.h behind the grid that prepares its bias.
#include "emulator/specimens/gemm_wgmma.h"

#include "emulator/copies/tensor_map.h"
#include "emulator/emulator.h"
#include "emulator/specimens/driver.h"
#include "emulator/specimens/reference.h"

namespace specimens {

using emulator::GlobalBuffer;
using emulator::PlantedFault;
using ptx::Major;

extern template void prepare_bias<PlantedFault>(const float*, float, float*, int);
extern template void gemm_wgmma<__nv_bfloat16, Major::kK, PlantedFault>(GemmWgmmaMaps,
                                                                        GemmWgmmaParams);
extern template void gemm_wgmma<__nv_bfloat16, Major::kMN, PlantedFault>(GemmWgmmaMaps,
                                                                         GemmWgmmaParams);
extern template void gemm_wgmma<__half, Major::kK, PlantedFault>(GemmWgmmaMaps, GemmWgmmaParams);
extern template void gemm_wgmma<__half, Major::kMN, PlantedFault>(GemmWgmmaMaps, GemmWgmmaParams);

namespace {

template <class T>
CUtensorMap tensor_map(const GlobalBuffer<T>& buffer, int rows, int columns, int pitch,
                       uint32_t box_rows) {
  CUtensorMap map;
  const cuuint64_t dimensions[] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[] = {pitch * sizeof(T)};
  const cuuint32_t box[] = {64, box_rows}, element_strides[] = {1, 1};
  const CUtensorMapDataType type = std::is_same_v<T, __half> ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                                             : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  const CUresult result = emulator::encode_tensor_map_tiled(
      &map, type, 2, const_cast<T*>(buffer.data()), dimensions, strides, box, element_strides,
      CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_NONE,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) throw std::runtime_error(emulator::tensor_map_error());
  return map;
}

template <class T, bool kMNMajor>
struct Problem {
  int m, n, k;
  Numbers numbers;
  float scale = 2.f;
  Matrix<T> x, w, a, b;
  Matrix<float> raw_bias;

  Problem(const Size& size, std::mt19937_64& random)
      : m(size.m),
        n(size.n),
        k(size.k),
        numbers(random() % 2 ? Numbers::Integers : Numbers::Reals),
        x(random_matrix<T>(m, k, padded(k), numbers, random)),
        w(kMNMajor ? random_matrix<T>(k, n, padded(n), numbers, random)
                   : random_matrix<T>(n, k, padded(k), numbers, random)),
        a(random_matrix<T>(kRank, k, padded(k), numbers, random)),
        b(kMNMajor ? random_matrix<T>(kRank, n, padded(n), numbers, random)
                   : random_matrix<T>(n, kRank, kRank, numbers, random)),
        raw_bias(random_matrix<float>(1, n, n, numbers, random)) {}

  double error(const Bounded& sum) const { return numbers == Numbers::Integers ? 0 : sum.error(); }
  // What a stored value may be off, where `sum` is off by `error` before it is rounded.
  double stored_error(const Bounded& sum, double error) const {
    return numbers == Numbers::Integers
               ? 0
               : error + rounding_unit<T>() * (std::fabs(sum.value) + error);
  }

  // S, then Y from the S that was stored: S is checked on its own, so its rounding is not counted
  // twice.
  std::string check(const GlobalBuffer<T>& s, const GlobalBuffer<T>& y, int y_pitch,
                    float amax) const {
    double expected_amax = 0, amax_error = 0;
    std::string difference;
    for (int i = 0; i < m; ++i) {
      for (int j = 0; j < kRank; ++j) {
        Bounded sum;
        for (int l = 0; l < k; ++l) sum.add(scale * x(i, l) * a(j, l));
        const double expected =
            numbers == Numbers::Integers ? to_double(from_double<T>(sum.value)) : sum.value;
        difference = compare("s", i, j, s[static_cast<size_t>(i) * kRank + j], expected,
                             stored_error(sum, error(sum)));
        if (!difference.empty()) return difference;
        expected_amax = std::max(expected_amax, std::fabs(sum.value));
        amax_error = std::max(amax_error, error(sum));
      }
      for (int j = 0; j < y_pitch; ++j) {
        const T got = y[static_cast<size_t>(i) * y_pitch + j];
        if (j >= n) {  // between the rows the poison stays
          if (!std::isnan(to_double(got))) return compare("y's padding", i, j, got, NAN, 0);
          continue;
        }
        Bounded sum;
        for (int l = 0; l < k; ++l) sum.add(x(i, l) * (kMNMajor ? w(l, j) : w(j, l)));
        for (int l = 0; l < kRank; ++l) {
          sum.add(to_double(s[static_cast<size_t>(i) * kRank + l]) *
                  (kMNMajor ? b(l, j) : b(j, l)));
        }
        sum.add(scale * raw_bias(0, j));
        const double expected =
            numbers == Numbers::Integers ? to_double(from_double<T>(sum.value)) : sum.value;
        difference = compare("y", i, j, got, expected, stored_error(sum, error(sum)));
        if (!difference.empty()) return difference;
      }
    }
    return compare("amax", 0, 0, amax, expected_amax, amax_error);
  }
};

template <class T, bool kMNMajor>
std::string run_gemm(const Case& run) {
  std::mt19937_64 random(run.seed);
  const int clusters = 1 + static_cast<int>(random() % 3);
  const Problem<T, kMNMajor> problem(run.size, random);
  const auto [m, n, k] = std::tuple(problem.m, problem.n, problem.k);
  const Jobs jobs(m, n);

  const GlobalBuffer<T> x(problem.x.values, "x"), w(problem.w.values, "w"),
      a(problem.a.values, "a"), b(problem.b.values, "b");
  const GlobalBuffer<float> raw_bias(problem.raw_bias.values, "raw_bias");
  GlobalBuffer<float> bias(n, "bias"), cluster_amax(clusters, "cluster_amax"), amax(1, "amax");
  const int y_pitch = padded(n);
  GlobalBuffer<T> s(static_cast<size_t>(m) * kRank, "s"), y(static_cast<size_t>(m) * y_pitch, "y");
  const int flags = kClusterSize * jobs.row_pairs;
  GlobalBuffer<uint32_t> s_ready(std::vector<uint32_t>(flags), "s_ready"),
      ticket(std::vector<uint32_t>(1), "ticket"), finished(std::vector<uint32_t>(1), "finished");

  const GemmWgmmaMaps maps{
      .x = tensor_map(x, m, k, problem.x.pitch, kBlockM),
      .w = tensor_map(w, problem.w.rows, problem.w.columns, problem.w.pitch, 64),
      .a = tensor_map(a, kRank, k, problem.a.pitch, kRank),
      .s = tensor_map(s, m, kRank, kRank, kBlockM),
      .b = tensor_map(b, problem.b.rows, problem.b.columns, problem.b.pitch, 64),
      .y = tensor_map(y, m, n, y_pitch, 64),
  };
  const GemmWgmmaParams params{.m = m,
                               .n = n,
                               .k = k,
                               .scale = problem.scale,
                               .bias = bias.data(),
                               .s = s.data(),
                               .s_ready = s_ready.data(),
                               .ticket = ticket.data(),
                               .finished = finished.data(),
                               .cluster_amax = cluster_amax.data(),
                               .amax = amax.data()};

  emulator::Stream stream;
  stream.launch({.grid = dim3((n + 127) / 128), .block = dim3(128)}, prepare_bias<PlantedFault>,
                raw_bias.data(), problem.scale, bias.data(), n);
  constexpr Major kMajor = kMNMajor ? Major::kMN : Major::kK;
  stream.launch({.grid = dim3(clusters * kClusterSize),
                 .block = dim3(kThreads),
                 .cluster = dim3(kClusterSize),
                 .shared_bytes = SharedPlan::kBytes,
                 .programmatic_dependent = true},
                gemm_wgmma<T, kMajor, PlantedFault>, maps, params);
  run_timed(stream);

  for (int i = 0; i < flags; ++i) {
    const std::string difference = compare("s_ready", 0, i, double(s_ready[i]), 0, 0);
    if (!difference.empty()) return difference;
  }
  std::string difference = compare("ticket", 0, 0, double(ticket[0]), 0, 0);
  if (difference.empty()) difference = compare("finished", 0, 0, double(finished[0]), 0, 0);
  return difference.empty() ? problem.check(s, y, y_pitch, amax[0]) : difference;
}

std::string run_variant(const Case& run) {
  if (run.variant == "bf16_k_major") return run_gemm<__nv_bfloat16, false>(run);
  if (run.variant == "bf16_mn_major") return run_gemm<__nv_bfloat16, true>(run);
  if (run.variant == "fp16_k_major") return run_gemm<__half, false>(run);
  return run_gemm<__half, true>(run);
}

}  // namespace
}  // namespace specimens

int main(int argc, char** argv) {
  using namespace specimens;
  return specimen_main(
      argc, argv,
      {.name = "gemm_wgmma",
       .sizes = {{"one_tile", 256, 128, 64},
                 {"odd", 200, 133, 203},
                 {"tall", 300, 72, 136},
                 {"deep", 256, 256, 448},
                 {"wide", 130, 500, 40},
                 {"tiny", 3, 1, 5}},
       .variants = {"bf16_k_major", "bf16_mn_major", "fp16_k_major", "fp16_mn_major"},
       .run = run_variant,
       .flops = [](const Size& size) {
         return 2.0 * size.m * (double(size.n) * (size.k + kRank) + double(kRank) * size.k);
       }});
}
