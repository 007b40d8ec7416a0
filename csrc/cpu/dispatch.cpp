#include "cpu/dispatch.h"

#include <atomic>

namespace lora_ext::cpu {
namespace {

constexpr const char* kLibrary = "library";

struct Choice {
  const char* name;
  const SkinnyKernels* general;        // any dtype; null on the library route
  const SkinnyKernels* bfloat16;       // null on the library route
  const FusedGemmKernels* fused_gemm;  // null: there are none
  const DequantizeKernels* dequantize;
};

std::vector<Choice> choices() {
  std::vector<Choice> found;
  if (amx_kernels() != nullptr && avx512_kernels() != nullptr) {
    found.push_back({amx_kernels()->name, avx512_kernels(), amx_kernels(), amx_fused_gemm(),
                     avx512_dequantize()});
  }
  const auto add = [&](const SkinnyKernels* kernels, const FusedGemmKernels* fused_gemm,
                       const DequantizeKernels* dequantize) {
    if (kernels == nullptr) return;
    found.push_back({kernels->name, kernels, kernels, fused_gemm, dequantize});
  };
  if (avx512_bf16_fused_gemm() != nullptr) {
    found.push_back({"avx512_bf16", avx512_kernels(), avx512_kernels(), avx512_bf16_fused_gemm(),
                     avx512_dequantize()});
  }
  add(avx512_kernels(), avx512_fused_gemm(), avx512_dequantize());
  add(avx2_kernels(), avx2_fused_gemm(), avx2_dequantize());
  add(portable_kernels(), nullptr, portable_dequantize());
  return found;
}

const std::vector<Choice>& available() {
  static const std::vector<Choice> found = choices();
  return found;
}

std::atomic<const Choice*>& current() {
  static std::atomic<const Choice*> choice{&available().front()};
  return choice;
}

}  // namespace

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const Choice& choice : available()) names.emplace_back(choice.name);
  return names;
}

std::string current_isa() { return current().load()->name; }

bool set_isa(const std::string& name) {
  static const Choice library{kLibrary, nullptr, nullptr, nullptr, portable_dequantize()};
  if (name == kLibrary || name == "auto") {
    current().store(name == kLibrary ? &library : &available().front());
    return true;
  }
  for (const Choice& choice : available()) {
    if (name == choice.name) {
      current().store(&choice);
      return true;
    }
  }
  return false;
}

const SkinnyKernels* kernels_for(Dtype dtype) {
  const Choice* choice = current().load();
  return dtype == Dtype::kBFloat16 ? choice->bfloat16 : choice->general;
}

const SkinnyKernels* kernels_for_few_rows() { return current().load()->general; }

const FusedGemmKernels* fused_gemm_kernels() { return current().load()->fused_gemm; }

const TileWalk* tile_walk(Dtype panel) { return fused_gemm_kernels()->walk_of(panel); }

const DequantizeKernels& dequantize_kernels() { return *current().load()->dequantize; }

}  // namespace lora_ext::cpu
