// Which microkernels there are, and which pay off, is decided by the processor alone, so that the
// same call has the same bits every time.
#include "cpu/brgemm.h"

#include <ATen/Context.h>
#include <ATen/native/CPUBlas.h>
#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include <algorithm>
#include <atomic>
#include <cmath>
#include <exception>
#include <iterator>
#include <string_view>
#include <vector>

#include "cpu/dispatch.h"

namespace lora_ext::cpu {
namespace {

enum class Panels { kAuto, kNone, kFloat, kBFloat16 };
constexpr std::string_view kNames[] = {"auto", "none", "float32", "bfloat16"};

std::atomic<Panels>& asked() {
  static std::atomic<Panels> panels{Panels::kAuto};
  return panels;
}

// The library has no query: where the kernel is missing, its first call throws.
bool is_available() {
  alignas(64) float a[kPanelCols] = {}, panel[2 * kPanelCols] = {}, c[kPanelCols];
  try {
    multiply_panel(1, 2, a, 2, panel, false, c);
    return true;
  } catch (const std::exception&) {
    return false;
  }
}

#if defined(__x86_64__)
bool is_intel() { return __builtin_cpu_is("intel") != 0; }
// Not every compiler's __builtin_cpu_supports knows the name of AVX512_FP16.
bool has_float16() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __builtin_cpu_supports("avx512f") != 0 &&
         __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) != 0 && (edx >> 23 & 1u) != 0;
}
#else
bool is_intel() { return false; }
bool has_float16() { return false; }
#endif

const Processor& this_processor() {
  static const Processor found = [] {
    const bool has_amx = amx_kernels() != nullptr;
    return Processor{is_intel(), has_amx, has_float16(), is_available(),
                     has_amx || avx512_bf16_fused_gemm() != nullptr};
  }();
  return found;
}

bool has_panels() {
  return at::globalContext().userEnabledMkldnn() && fused_gemm_kernels() != nullptr;
}

// Whether a row of A has the same bits in C in products of any number of rows, in a first block of
// the depth and in one that is added.
bool rows_are_alike() {
  constexpr int64_t kRows = 64, kDepth = 151, kAdded = 37;
  std::vector<float> a(kRows * kDepth), panel(kDepth * kPanelCols);
  std::vector<float> one(kPanelCols), c(kRows * kPanelCols);
  for (size_t i = 0; i < a.size(); ++i) a[i] = std::sin(0.7F * static_cast<float>(i % kDepth));
  for (size_t i = 0; i < panel.size(); ++i) panel[i] = std::sin(0.3F * static_cast<float>(i));
  const auto multiply = [&](int64_t rows, std::vector<float>& sums) {
    multiply_panel(rows, kDepth, a.data(), kDepth, panel.data(), false, sums.data());
    multiply_panel(rows, kAdded, a.data(), kDepth, panel.data(), true, sums.data());
  };
  multiply(1, one);
  bool alike = true;
  for (int64_t rows = kRows; rows > 1; rows /= 2) {
    multiply(rows, c);
    for (int64_t row = 0; row < rows; ++row) {
      alike &= std::equal(one.begin(), one.end(), c.begin() + row * kPanelCols);
    }
  }
  return alike;
}

}  // namespace

bool is_offered(const Processor& processor, Dtype panel, Dtype x) {
  if (x != Dtype::kFloat32 && x != Dtype::kBFloat16 && x != Dtype::kFloat16) return false;
  if (panel == Dtype::kFloat32) return processor.float_products;
  return panel == Dtype::kBFloat16 && x == panel && processor.bfloat16_products;
}

// The dtype of the panels where they are faster than torch's linear. With AMX that is several times
// as fast on float16 as floats are, and our own tiles are faster on bfloat16. On other processors:
//
// float32   Not on Intel's: there torch's product is MKL's, and faster than panels by more than the
//           passes around it cost (a Xeon: panels take 1.0 to 1.3 of it, with passes 1.0 to 1.1).
// float16   Where there is no AVX512_FP16: on a Zen 4 torch's linear took 4.7 times float32's.
// bfloat16  By the walk of vdpbf16ps, which has twice the products of floats on a Zen 4. Intel's
//           cores run it at less than half of that rate if they have no AMX, or hide it: torch's
//           linear on 2048 rows of 1024 x 1024 took 25.6 ms, panels of floats 16.
std::optional<Dtype> faster_panels(const Processor& processor, Dtype x) {
  const auto if_offered = [&](Dtype panel) {
    return is_offered(processor, panel, x) ? std::optional(panel) : std::nullopt;
  };
  if (x == Dtype::kFloat32) return processor.is_intel ? std::nullopt : if_offered(x);
  if (processor.has_amx) return x == Dtype::kBFloat16 ? if_offered(x) : std::nullopt;
  if (x == Dtype::kFloat16 && processor.has_float16) return {};
  if (!processor.is_intel && if_offered(x)) return x;
  return if_offered(Dtype::kFloat32);
}

bool has_panels_of(Dtype panel, Dtype x) {
  if (!has_panels() || !is_offered(this_processor(), panel, x)) return false;
  return panel == Dtype::kFloat32 || tile_walk(panel) != nullptr;
}

bool panels_are_auto() { return asked().load() == Panels::kAuto; }

std::optional<Dtype> panel_dtype(Dtype x) {
  const auto if_possible = [&](Dtype panel) {
    return has_panels_of(panel, x) ? std::optional(panel) : std::nullopt;
  };
  if (!has_panels()) return {};
  switch (asked().load()) {
    case Panels::kNone:
      return {};
    case Panels::kFloat:
      return if_possible(Dtype::kFloat32);
    case Panels::kBFloat16:
      return if_possible(Dtype::kBFloat16);
    case Panels::kAuto:
      break;
  }
  const auto faster = faster_panels(this_processor(), x);
  return faster ? if_possible(*faster) : faster;
}

std::optional<Dtype> batch_invariant_panel_dtype(Dtype x) {
  if (asked().load() == Panels::kNone || !has_panels() || x == Dtype::kFloat64) return {};
  if (x != Dtype::kFloat32 && this_processor().has_amx) return {};
  const std::optional<Dtype> faster = panel_dtype(x);
  // A row's sums are made alike wherever it is in a block of the walk by vdpbf16ps.
  if (faster == Dtype::kBFloat16) return faster;
  static const bool alike = this_processor().float_products && rows_are_alike();
  return alike ? std::optional(Dtype::kFloat32) : std::nullopt;
}

bool set_panels(const std::string& name) {
  const auto* const found = std::find(std::begin(kNames), std::end(kNames), name);
  if (found == std::end(kNames)) return false;
  asked().store(static_cast<Panels>(found - std::begin(kNames)));
  return true;
}

void multiply_panel(int64_t m, int64_t k, const float* a, int64_t a_pitch, const float* panel,
                    bool add, float* c) {
  at::native::cpublas::brgemm(m, kPanelCols, k, a_pitch, kPanelCols, kPanelCols, add, a, panel, c);
}

}  // namespace lora_ext::cpu
