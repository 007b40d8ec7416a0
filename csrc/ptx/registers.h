// The register budget of a warp, which warpgroups of one block can exchange.
//
// Needs __launch_bounds__ with a number of blocks; ptxas ignores it with -rdc or calls of external
// functions (messages C7504-C7509).
#pragma once

#include "ptx/target.h"

namespace lora_ext::ptx {

// setmaxnreg.dec (sm_90a): releases all registers over kRegisters, a multiple of 8 in 24..256.
// Every warp of the warpgroup must execute it.
template <int kRegisters>
LORA_EXT_DEVICE void setmaxnreg_dec() {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
#ifdef __CUDACC__
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
#else
  emulator::setmaxnreg_dec(kRegisters);
#endif
}

// setmaxnreg.inc (sm_90a): waits until the block's pool has enough registers, then takes them.
template <int kRegisters>
LORA_EXT_DEVICE void setmaxnreg_inc() {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
#ifdef __CUDACC__
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
#else
  emulator::setmaxnreg_inc(kRegisters);
#endif
}

}  // namespace lora_ext::ptx
