// Which microkernels there are, and which pay off, is decided by the processor alone, so that the
// same call has the same bits every time.
#include "cpu/brgemm.h"

#include <ATen/Context.h>
#include <ATen/native/CPUBlas.h>

#include <atomic>
#include <exception>

#include "cpu/dispatch.h"

namespace lora_ext::cpu {
namespace {

enum class Panels { kAuto, kNone, kFloat, kBFloat16 };

std::atomic<Panels>& asked() {
  static std::atomic<Panels> panels{Panels::kAuto};
  return panels;
}

// The library has no query: where a kernel is missing, its first call throws.
bool is_available(Dtype dtype) {
  alignas(64) float a[kPanelCols] = {}, panel[2 * kPanelCols] = {}, c[kPanelCols];
  try {
    multiply_panel(dtype, 1, 2, a, 2, panel, false, c);
    release_panels(dtype);
    return true;
  } catch (const std::exception&) {
    return false;
  }
}

bool has_float() {
  static const bool available = is_available(Dtype::kFloat32);
  return available;
}

bool has_bfloat16() {
  static const bool available = is_available(Dtype::kBFloat16);
  return available;
}

bool has_amx() { return amx_kernels() != nullptr; }

#if defined(__x86_64__)
bool is_intel() { return __builtin_cpu_is("intel") != 0; }
bool has_float16() { return __builtin_cpu_supports("avx512fp16") != 0; }
bool has_dot_bfloat16() { return __builtin_cpu_supports("avx512bf16") != 0; }
#else
bool is_intel() { return false; }
bool has_float16() { return false; }
bool has_dot_bfloat16() { return false; }
#endif

// The dtype of the panels where they are faster than torch's linear, on processors without AMX:
//
// float32   Not on Intel's, where torch's product is MKL's: it has no passes to save that cost as
//           much as panels are slower.
// float16   Where there is no AVX512_FP16, torch's linear takes 4.7 times as long as on floats.
// bfloat16  In bfloat16 where AVX512_BF16 has twice the products of floats (AMD's Zen 4). Intel's
//           cores run it at less than half of that rate if they have no AMX, or hide it: torch's
//           linear on 2048 rows of 1024 x 1024 took 25.6 ms, panels of floats 16.
std::optional<Dtype> faster_panels(Dtype x) {
  if (x == Dtype::kFloat32) return is_intel() || !has_float() ? std::nullopt : std::optional(x);
  if (x == Dtype::kFloat16 && has_float16()) return {};
  if (x == Dtype::kBFloat16 && has_dot_bfloat16() && !is_intel() && has_bfloat16()) return x;
  return has_float() ? std::optional(Dtype::kFloat32) : std::nullopt;
}

}  // namespace

std::optional<Dtype> panel_dtype(Dtype x) {
  if (!at::globalContext().userEnabledMkldnn() || fused_gemm_kernels() == nullptr) return {};
  switch (asked().load()) {
    case Panels::kNone:
      return {};
    case Panels::kFloat:
      return has_float() ? std::optional(Dtype::kFloat32) : std::nullopt;
    case Panels::kBFloat16:
      if (x == Dtype::kBFloat16 && has_bfloat16()) return Dtype::kBFloat16;
      return {};
    case Panels::kAuto:
      break;
  }
  // With AMX torch's linear on half types is several times as fast as floats are.
  static const std::optional<Dtype> faster[] = {faster_panels(Dtype::kFloat32),
                                                faster_panels(Dtype::kBFloat16),
                                                faster_panels(Dtype::kFloat16)};
  if (x == Dtype::kFloat32) return faster[0];
  if (has_amx()) return {};
  return faster[x == Dtype::kBFloat16 ? 1 : 2];
}

bool set_panels(const std::string& name) {
  if (name == "auto") {
    asked().store(Panels::kAuto);
  } else if (name == "none") {
    asked().store(Panels::kNone);
  } else if (name == "float32") {
    asked().store(Panels::kFloat);
  } else if (name == "bfloat16") {
    asked().store(Panels::kBFloat16);
  } else {
    return false;
  }
  return true;
}

void multiply_panel(Dtype dtype, int64_t m, int64_t k, const void* a, int64_t a_pitch,
                    const void* panel, bool add, float* c) {
  namespace blas = at::native::cpublas;
  if (dtype == Dtype::kBFloat16) {
    blas::brgemm(m, kPanelCols, k, a_pitch, kPanelCols, kPanelCols, add,
                 static_cast<const at::BFloat16*>(a), static_cast<const at::BFloat16*>(panel), c);
  } else {
    blas::brgemm(m, kPanelCols, k, a_pitch, kPanelCols, kPanelCols, add,
                 static_cast<const float*>(a), static_cast<const float*>(panel), c);
  }
}

void release_panels(Dtype dtype) { at::native::cpublas::brgemm_release(dtype == Dtype::kBFloat16); }

}  // namespace lora_ext::cpu
