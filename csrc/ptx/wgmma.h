// The asynchronous matrix multiply-accumulate of a warpgroup (sm_90a), with fp32 accumulators and
// operands T = __nv_bfloat16 or __half:
//
//     d[64, N] (+)= a[64, 16] b[16, N]
//
// b, and a in wgmma_ss, are in shared memory, described by matrix_descriptor. The order is
//
//     wgmma_fence(); wgmma_ss(...) ...; wgmma_commit_group(); ... wgmma_wait_group<0>();
//
// and in between neither d nor a's registers may be touched. wgmma_pin(d) before the first and after
// the last of these holds the compiler to that. All four warps of the warpgroup must execute it.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "ptx/target.h"
#include "ptx/wgmma_operands.h"

namespace lora_ext::ptx {

// Which dimension of an operand in shared memory is contiguous: k, or m (for a) or n (for b).
enum class Major { kK, kMN };

// wgmma.fence (sm_90a): orders earlier accesses to d's and a's registers before the wgmmas that
// follow.
LORA_EXT_DEVICE void wgmma_fence() {
#ifdef __CUDACC__
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#else
  emulator::wgmma_fence();
#endif
}

// No instruction: the compiler moves no access to d's registers from one side of it to the other. The
// others are volatile, but do not name d; where ptxas then finds it touched in between, every wgmma
// waits for the one before (C75xx).
template <int kCount>
LORA_EXT_DEVICE void wgmma_pin([[maybe_unused]] float (&d)[kCount]) {
#ifdef __CUDACC__
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i])::"memory");
#endif
}

// wgmma.commit_group (sm_90a): the warpgroup's wgmmas since the last commit become one group.
LORA_EXT_DEVICE void wgmma_commit_group() {
#ifdef __CUDACC__
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#else
  emulator::wgmma_commit_group();
#endif
}

// wgmma.wait_group (sm_90a): waits until at most the kPending latest groups are in flight.
template <int kPending>
LORA_EXT_DEVICE void wgmma_wait_group() {
  static_assert(kPending >= 0 && kPending <= 7);
#ifdef __CUDACC__
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
#else
  emulator::wgmma_wait_group(kPending);
#endif
}

#ifdef __CUDACC__
// One specialisation per N, the number of columns of b and d.
template <int N>
struct WgmmaInstruction {
  static_assert(N < 0, "add a row for this N to the table of LORA_EXT_WGMMA");
};

// `r` is the number of accumulator registers; r1 .. r4 are the numbers after it, for the operands
// that follow: a, b, accumulate, and the two transpose flags, which are immediates in PTX.
#define LORA_EXT_WGMMA_TYPE(name, type, n, r, r1, r2, r3, r4)                                 \
  template <int kTransposeA, int kTransposeB>                                                 \
  LORA_EXT_DEVICE static void ss_##name(float (&d)[r], uint64_t a, uint64_t b,                \
                                        uint32_t accumulate) {                                \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #r2                                     \
                 ", 0;\n"                                                                     \
                 "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type              \
                 " {" LORA_EXT_REGISTERS_##r "}, %" #r ", %" #r1 ", p, 1, 1, %" #r3 ", %" #r4 \
                                             ";\n}"                                           \
                 : LORA_EXT_ACCUMULATORS_##r                                                  \
                 : "l"(a), "l"(b), "r"(accumulate), "n"(kTransposeA), "n"(kTransposeB));      \
  }

#define LORA_EXT_WGMMA(n, ...)                        \
  template <>                                         \
  struct WgmmaInstruction<n> {                        \
    LORA_EXT_WGMMA_TYPE(bf16, "bf16", n, __VA_ARGS__) \
    LORA_EXT_WGMMA_TYPE(f16, "f16", n, __VA_ARGS__)   \
  };

LORA_EXT_WGMMA(64, 32, 33, 34, 35, 36)
LORA_EXT_WGMMA(192, 96, 97, 98, 99, 100)
LORA_EXT_WGMMA(256, 128, 129, 130, 131, 132)

#undef LORA_EXT_WGMMA
#undef LORA_EXT_WGMMA_TYPE
#endif  // __CUDACC__

// wgmma.mma_async m64nNk16, a and b in shared memory (sm_90a). With accumulate == false d is
// overwritten.
template <typename T, int N, Major kMajorA, Major kMajorB>
LORA_EXT_DEVICE void wgmma_ss(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate) {
  static_assert(std::is_same_v<T, __nv_bfloat16> || std::is_same_v<T, __half>);
#ifdef __CUDACC__
  constexpr int kTransposeA = kMajorA == Major::kMN, kTransposeB = kMajorB == Major::kMN;
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    WgmmaInstruction<N>::template ss_bf16<kTransposeA, kTransposeB>(d, a, b, accumulate);
  } else {
    WgmmaInstruction<N>::template ss_f16<kTransposeA, kTransposeB>(d, a, b, accumulate);
  }
#else
  const emulator::WgmmaShape shape{emulator::format_of<T>(), N, emulator::Major{int(kMajorA)},
                                   emulator::Major{int(kMajorB)}};
  emulator::wgmma_ss(shape, d, a, b, accumulate);
#endif
}

}  // namespace lora_ext::ptx
