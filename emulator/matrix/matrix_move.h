// ldmatrix and stmatrix: 8x8 matrices of 16-bit elements between a warp's registers and shared
// memory.
//
// Lane 8j + i addresses row i of matrix j: 16 bytes, 16-byte aligned, in the block's own memory.
// Which element lands in which lane is in layouts.h. A matrix is one phase of the memory: its eight
// rows should lie in different banks.
#pragma once

#include <cstdint>

namespace emulator {

// `count` matrices, 2 or 4, one register each; `transposed` is .trans.
void ldmatrix(uint32_t count, bool transposed, uint32_t* registers, uint32_t address);
// Four matrices.
void stmatrix(uint32_t address, const uint32_t* registers);

inline void ldmatrix_x4(uint32_t (&r)[4], uint32_t address) { ldmatrix(4, false, r, address); }
inline void ldmatrix_x2_trans(uint32_t (&r)[2], uint32_t address) { ldmatrix(2, true, r, address); }
inline void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t address) { ldmatrix(4, true, r, address); }

inline void stmatrix_x4(uint32_t address, const uint32_t (&r)[4]) { stmatrix(address, r); }

}  // namespace emulator
