// Selects the CPU kernels' instruction set: the best of the processor, or the user's choice.
#pragma once

#include <string>
#include <vector>

#include "cpu/dequantize.h"
#include "cpu/fused_gemm.h"
#include "cpu/skinny.h"

namespace lora_ext::cpu {

// "amx", "avx512_bf16", "avx512", "avx2", "portable": those that this build and processor have, best
// first.
std::vector<std::string> available_isas();

// The name in use; "library" when every call takes the ATen route.
std::string current_isa();

// One of available_isas(), "library", or "auto" for the best. False: not available.
bool set_isa(const std::string& name);

// The kernels for activations of `dtype`, null on the library route.
const SkinnyKernels* kernels_for(Dtype dtype);

// The same for so few rows that tiles of 32 would be mostly empty.
const SkinnyKernels* kernels_for_few_rows();

// The kernels for the layer in one pass; null where there are none and on the library route.
const FusedGemmKernels* fused_gemm_kernels();

// The kernels' own walk on tiles for products by these panels, or null.
const TileWalk* tile_walk(Dtype panel);

// The kernels of the same instruction set; the portable ones on the library route.
const DequantizeKernels& dequantize_kernels();

}  // namespace lora_ext::cpu
