// Special registers of a thread, addresses in shared memory, and a warp's register budget.
//
// Shared addresses are 32-bit, as in PTX's .shared state space. A shared::cta address is also a
// shared::cluster address: that of the block's own memory.
#pragma once
#include "ptx/target.h"

namespace lora_ext::ptx {

// %cluster_ctarank (sm_90): the rank of this block in its cluster; 0 without clusters.
LORA_EXT_DEVICE uint32_t cluster_rank() {
#ifdef __CUDACC__
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
#else
  return emulator::cluster_rank();
#endif
}

// cvta.to.shared (every sm): the shared address of a generic pointer into shared memory.
LORA_EXT_DEVICE uint32_t shared_address(const void* pointer) {
#ifdef __CUDACC__
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
#else
  return emulator::shared_address(pointer);
#endif
}

// The launch's dynamic shared memory. 1024 bytes is the alignment that a tile with the 128-byte
// swizzle needs (PTX ISA, "Swizzling modes").
LORA_EXT_DEVICE unsigned char* dynamic_shared_memory() {
#ifdef __CUDACC__
  extern __shared__ __align__(1024) unsigned char lora_ext_shared_memory[];
  return lora_ext_shared_memory;
#else
  return emulator::dynamic_shared_memory();
#endif
}

// mapa.shared::cluster (sm_90): the address in block `rank`'s shared memory that corresponds to
// `address` in this block's.
LORA_EXT_DEVICE uint32_t map_shared(uint32_t address, uint32_t rank) {
#ifdef __CUDACC__
  uint32_t mapped;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(mapped) : "r"(address), "r"(rank));
  return mapped;
#else
  return emulator::map_shared(address, rank);
#endif
}

// elect.sync (sm_90): true in one lane of the warp, the same each time, false in the others. All 32
// lanes must execute it. ptxas then knows that the code after it runs in one lane, so the operands
// of TMA, which are in uniform registers, need no loop over lanes that might differ, as they do
// after a comparison of threadIdx.
LORA_EXT_DEVICE bool elect_sync() {
#ifdef __CUDACC__
  uint32_t elected;
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "elect.sync _|p, 0xffffffff;\n"
      "selp.b32 %0, 1, 0, p;\n"
      "}"
      : "=r"(elected));
  return elected != 0;
#else
  return emulator::elect_sync();
#endif
}

// The register budget of a warp, which warpgroups of one block can exchange, needs
// __launch_bounds__ with a number of blocks; ptxas ignores it with -rdc or calls of external
// functions (messages C7504-C7509).

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
