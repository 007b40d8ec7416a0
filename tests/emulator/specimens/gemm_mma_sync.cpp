// Runs the GEMM of gemm_mma_sync.h.
#include "emulator/specimens/gemm_mma_sync.h"

#include "emulator/emulator.h"
#include "emulator/specimens/driver.h"
#include "emulator/specimens/reference.h"

namespace specimens {

using emulator::GlobalBuffer;
using emulator::PlantedFault;

extern template void gemm_mma_sync<__nv_bfloat16, false, PlantedFault>(
    GemmMmaSyncParams<__nv_bfloat16>);
extern template void gemm_mma_sync<__nv_bfloat16, true, PlantedFault>(
    GemmMmaSyncParams<__nv_bfloat16>);
extern template void gemm_mma_sync<__half, false, PlantedFault>(GemmMmaSyncParams<__half>);
extern template void gemm_mma_sync<__half, true, PlantedFault>(GemmMmaSyncParams<__half>);

namespace {

template <class T, bool kMNMajorB>
std::string run_gemm(const Case& run) {
  const auto [name, m, n, k] = run.size;
  std::mt19937_64 random(run.seed);
  const Numbers numbers = random() % 2 ? Numbers::Integers : Numbers::Reals;
  const bool with_bias = random() % 4 != 0;
  const auto a = random_matrix<T>(m, k, padded(k), numbers, random);
  const auto b = kMNMajorB ? random_matrix<T>(k, n, padded(n), numbers, random)
                           : random_matrix<T>(n, k, padded(k), numbers, random);
  const auto bias = random_matrix<float>(1, n, n, numbers, random);

  const GlobalBuffer<T> a_buffer(a.values, "a"), b_buffer(b.values, "b");
  const GlobalBuffer<float> bias_buffer(bias.values, "bias");
  const int c_pitch = n + 3;
  GlobalBuffer<float> c(static_cast<size_t>(m) * c_pitch, "c");
  c.fill(-12345.f);

  using Gemm = GemmMmaSync<T, kMNMajorB, PlantedFault>;
  emulator::Stream stream;
  stream.launch(
      {.grid = dim3((n + Gemm::kTile - 1) / Gemm::kTile, (m + Gemm::kTile - 1) / Gemm::kTile),
       .block = dim3(Gemm::kThreads),
       .shared_bytes = Gemm::kSharedBytes},
      gemm_mma_sync<T, kMNMajorB, PlantedFault>,
      GemmMmaSyncParams<T>{a_buffer.data(), b_buffer.data(),
                           with_bias ? bias_buffer.data() : nullptr, c.data(), m, n, k, a.pitch,
                           b.pitch, c_pitch});
  run_timed(stream);

  for (int i = 0; i < m; ++i) {
    for (int j = 0; j < c_pitch; ++j) {
      Bounded expected;
      if (j < n) {
        for (int l = 0; l < k; ++l) expected.add(a(i, l) * (kMNMajorB ? b(l, j) : b(j, l)));
        if (with_bias) expected.add(bias(0, j));
      } else {
        expected.value = -12345;  // between the rows nothing is written
      }
      const std::string difference =
          compare("c", i, j, c[static_cast<size_t>(i) * c_pitch + j], expected.value,
                  numbers == Numbers::Integers ? 0 : expected.error());
      if (!difference.empty()) return difference;
    }
  }
  return "";
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
      {.name = "gemm_mma_sync",
       .sizes = {{"even", 128, 64, 256},
                 {"odd", 75, 93, 333},
                 {"shallow", 65, 64, 61},
                 {"two_steps", 64, 130, 100},
                 {"tiny", 3, 1, 5}},
       .variants = {"bf16_k_major", "bf16_mn_major", "fp16_k_major", "fp16_mn_major"},
       .run = run_variant,
       .flops = gemm_flops});
}
