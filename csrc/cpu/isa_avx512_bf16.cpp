// The layer in one pass by vdpbf16ps, for bfloat16 on processors with AVX512_BF16; the passes are
// AVX-512's. Compiled on x86-64 by a target pragma; chosen at run time.
#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <span>
#include <utility>
#include <vector>

#include "cpu/fused_product.h"
#include "cpu/skinny.h"

#if defined(__x86_64__)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,prefer-vector-width=512")
#endif

namespace lora_ext::cpu {
namespace {

// clang-format off
#include "cpu/pairs.h"
#include "cpu/pair_panels.h"
#include "cpu/dot_tile.h"
#include "cpu/dot_product.h"
// clang-format on

constexpr TileWalk kTileWalk = {kDotRows,      kDotLeastRows, kDotLeastOwnRows, kDotMostDepth,
                                kDotLeastCols, INT64_MAX,     dot_cols,         nullptr,
                                dot_bytes,     dot_run,       dot_make_t};

}  // namespace
}  // namespace lora_ext::cpu

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace lora_ext::cpu {

const FusedGemmKernels* avx512_bf16_fused_gemm() {
  static const bool supported =
      __builtin_cpu_supports("avx512bf16") != 0 && avx512_fused_gemm() != nullptr;
  if (!supported) return nullptr;
  static const FusedGemmKernels kernels = with_walk(*avx512_fused_gemm(), kTileWalk);
  return &kernels;
}

}  // namespace lora_ext::cpu

#else

namespace lora_ext::cpu {
const FusedGemmKernels* avx512_bf16_fused_gemm() { return nullptr; }
}  // namespace lora_ext::cpu

#endif
