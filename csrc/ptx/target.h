// What a function of csrc/ptx/ is on each target: inline asm for the device, and for the host a
// call of the function of the same name in the execution layer (emulator/).
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define LORA_EXT_DEVICE __device__ __forceinline__
#else
#include "emulator/emulator.h"
#define LORA_EXT_DEVICE inline
#endif

namespace lora_ext::ptx {

// Whether instructions of sm_90a alone (wgmma, setmaxnreg) may be used where this is compiled for.
#if defined(__CUDACC__) && !defined(__CUDA_ARCH_FEAT_SM90_ALL)
constexpr bool kHasSm90a = false;
#else
constexpr bool kHasSm90a = true;
#endif

}  // namespace lora_ext::ptx
