// Programmatic dependent launch: a grid that starts before the one that it depends on has ended.
#pragma once

#include "ptx/target.h"

namespace lora_ext::ptx {

// griddepcontrol.wait (sm_90): waits until the grids that this one depends on have completed and
// their memory is visible. Nothing where no grid can depend so.
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
// its blocks have come here or exited. It publishes nothing of what they wrote. Such a grid may
// read what one of them had waited for before it came here; for all else it must itself wait.
// Nothing where no grid can depend so.
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
