// The skinny passes on AMX tiles, for bfloat16 activations.
//
// Every product runs as bfloat16 tiles with float sums. Values that are not bfloat16 are written as
// a sum of two bfloat16 terms, hi = bf16(v) and lo = bf16(v - hi), exact to 2^-17: T always, the
// adapters if they are float. Terms extend the inner dimension, so a product of split operands is
// still one tile product over [hi hi lo] x [hi lo hi]; lo x lo, 2^-34, is left out:
//
//              A (rows x inner)             B (inner x 16 columns, pairs interleaved)
//     shrink   P, in its original layout    Q_hi and Q_lo, accumulated onto the same tile
//     expand   [T_hi T_lo (T_hi)]           [U_hi U_hi (U_lo)]^T, packed once per call
//     wgrad    T_hi^T and T_lo^T            P, two rows interleaved while it is staged
//
// A tile is 16 rows of 64 bytes; TDPBF16PS multiplies 16 x 32 by 32 x 16 in 16 cycles. Compiled on
// x86-64 by a target pragma; chosen at run time if processor and kernel grant the tile state.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>

#include "cpu/fused_product.h"
#include "cpu/skinny.h"

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#if defined(__clang__)
#pragma clang attribute push(                                                                   \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,amx-tile,amx-bf16"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,amx-tile,amx-bf16")
#endif

namespace lora_ext::cpu {
namespace {

#include "cpu/simd_dropout.h"
// clang-format off
#include "cpu/simd_avx512_dropout.h"
#include "cpu/wgrad_store.h"
#include "cpu/pairs.h"
#include "cpu/pair_panels.h"
#include "cpu/amx_tiles.h"
#include "cpu/amx_shrink.h"
#include "cpu/amx_expand.h"
#include "cpu/amx_wgrad.h"
#include "cpu/amx_blocks.h"
#include "cpu/amx_rounding.h"
#include "cpu/amx_packing.h"
#include "cpu/amx_product.h"
// clang-format on

constexpr SkinnyKernels kKernels = {"amx",
                                    kRowBlock,
                                    kColBlock,
                                    shrink_panel_bytes,
                                    pack_shrink,
                                    expand_panel_bytes,
                                    pack_expand,
                                    {kRowBlock, expand_t_bytes, pack_expand_t},
                                    {kTileDepth, wgrad_t_bytes, pack_wgrad_t},
                                    shrink_bytes,
                                    wgrad_bytes,
                                    shrink,
                                    expand,
                                    wgrad,
                                    nullptr,
                                    nullptr,
                                    dropout_bits<AmxDropout>};

constexpr TileWalk kTileWalk = {kRowBlock,    kTileLeastRows, kTileLeastRows,
                                INT64_MAX,    kTileLeastCols, kWholeSteps * kTileDepth,
                                product_cols, makes_t,        product_bytes,
                                run_product};

}  // namespace
}  // namespace lora_ext::cpu

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace lora_ext::cpu {
namespace {

// Linux grants the tile registers to a process on request (Documentation/arch/x86/xstate.rst).
bool request_tiles() {
  constexpr long kArchReqXcompPerm = 0x1023;
  constexpr long kXfeatureTileData = 18;
  return syscall(SYS_arch_prctl, kArchReqXcompPerm, kXfeatureTileData) == 0;
}

bool has_amx() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) == 0) return false;
  return (edx >> 22 & 1u) != 0 && (edx >> 24 & 1u) != 0;  // AMX-BF16, AMX-TILE
}

}  // namespace

const SkinnyKernels* amx_kernels() {
  static const bool supported = has_amx() && __builtin_cpu_supports("avx512bf16") &&
                                avx512_kernels() != nullptr && request_tiles();
  return supported ? &kKernels : nullptr;
}

const FusedGemmKernels* amx_fused_gemm() {
  if (amx_kernels() == nullptr) return nullptr;
  static const FusedGemmKernels kernels = with_walk(*avx512_fused_gemm(), kTileWalk);
  return &kernels;
}

}  // namespace lora_ext::cpu

#else

namespace lora_ext::cpu {
const SkinnyKernels* amx_kernels() { return nullptr; }
const FusedGemmKernels* amx_fused_gemm() { return nullptr; }
}  // namespace lora_ext::cpu

#endif
