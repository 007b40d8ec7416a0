// The warp's matrix multiply-accumulate of sm_80, and moves of 8x8 matrices of 16-bit elements
// between a warp's registers and shared memory.
//
// A matrix row is 16 bytes and 16-byte aligned. Lane 8j + i passes the address of row i of matrix j
// (addresses of the lanes past 8 x count are ignored). r[j] of lane l holds elements 2(l % 4) and
// 2(l % 4) + 1 of row l / 4 of matrix j; with _trans, of column l / 4.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "ptx/target.h"

namespace lora_ext::ptx {

// ldmatrix.x2.trans (sm_75): loads two matrices, transposed.
LORA_EXT_DEVICE void ldmatrix_x2_trans(uint32_t (&r)[2], uint32_t address) {
#ifdef __CUDACC__
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(address)
               : "memory");
#else
  emulator::ldmatrix_x2_trans(r, address);
#endif
}

// ldmatrix.x4 (sm_75): loads four matrices.
LORA_EXT_DEVICE void ldmatrix_x4(uint32_t (&r)[4], uint32_t address) {
#ifdef __CUDACC__
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
#else
  emulator::ldmatrix_x4(r, address);
#endif
}

// ldmatrix.x4.trans (sm_75): loads four matrices, transposed.
LORA_EXT_DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t address) {
#ifdef __CUDACC__
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
#else
  emulator::ldmatrix_x4_trans(r, address);
#endif
}

// stmatrix.x4 (sm_90): stores four matrices.
LORA_EXT_DEVICE void stmatrix_x4(uint32_t address, const uint32_t (&r)[4]) {
#ifdef __CUDACC__
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address),
               "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
#else
  emulator::stmatrix_x4(address, r);
#endif
}

// mma.sync m16n8k16 (sm_80): d[16, 8] += a[16, 16] b[16, 8], fp32 accumulators, T = __nv_bfloat16
// or __half. The fragments are those of PTX ISA, "Matrix fragments for mma.m16n8k16".
template <typename T>
LORA_EXT_DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  static_assert(std::is_same_v<T, __nv_bfloat16> || std::is_same_v<T, __half>);
#ifdef __CUDACC__
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
#else
  emulator::mma_m16n8k16(emulator::format_of<T>(), d, a, b);
#endif
}

}  // namespace lora_ext::ptx
