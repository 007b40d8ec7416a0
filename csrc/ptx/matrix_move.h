// Moves of 8x8 matrices of 16-bit elements between a warp's registers and shared memory.
//
// A matrix row is 16 bytes and 16-byte aligned. Lane 8j + i passes the address of row i of matrix j
// (addresses of the lanes past 8 x count are ignored). r[j] of lane l holds elements 2(l % 4) and
// 2(l % 4) + 1 of row l / 4 of matrix j; with _trans, of column l / 4.
#pragma once

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

}  // namespace lora_ext::ptx
