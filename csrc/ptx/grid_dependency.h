// Programmatic dependent launch (PDL): a grid starts before the grid that it depends on has ended.
#pragma once

#include "ptx/target.h"

namespace lora_ext::ptx {

// griddepcontrol.wait (sm_90): waits until the grids that this one depends on have completed and
// their memory is visible. A no-op in a grid without such a dependency.
LORA_EXT_DEVICE void griddepcontrol_wait() {
#ifdef __CUDACC__
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
#else
  emulator::griddepcontrol_wait();
#endif
}

// griddepcontrol.launch_dependents (sm_90): the grids that depend on this one may start once all
// its blocks have executed this or exited. It does not publish what the blocks wrote. A dependent
// grid may read what a block had waited for before it executed this; for all else it must itself
// wait. A no-op if no grid depends on this one.
LORA_EXT_DEVICE void griddepcontrol_launch_dependents() {
#ifdef __CUDACC__
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
#else
  emulator::griddepcontrol_launch_dependents();
#endif
}

}  // namespace lora_ext::ptx
