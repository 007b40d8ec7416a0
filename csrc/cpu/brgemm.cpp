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

// Where bfloat16 products without AMX are faster than float's. An instruction of AVX512_BF16 has
// twice as many products, but Intel's cores before AMX, and those whose AMX is hidden, run it at
// less than half the rate: 2048 rows of 1024 x 1024 took 25.6 ms with torch's linear, 15 ms as
// floats. On AMD's Zen 4 the rates are equal, and bfloat16 twice as fast.
bool is_bfloat16_fast() {
#if defined(__x86_64__)
  static const bool fast =
      __builtin_cpu_supports("avx512bf16") && !__builtin_cpu_is("intel") && has_bfloat16();
  return fast;
#else
  return false;
#endif
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
  if (x != Dtype::kFloat32 && has_amx()) return {};
  if (x == Dtype::kBFloat16 && is_bfloat16_fast()) return Dtype::kBFloat16;
  return has_float() ? std::optional(Dtype::kFloat32) : std::nullopt;
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
