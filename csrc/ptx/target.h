// How a function of csrc/ptx/ is compiled for each target: inline asm for the device; for the host
// a call of the function of the same name in the execution layer (emulator/).
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define LORA_EXT_DEVICE __device__ __forceinline__
#else
#include "emulator/emulator.h"
#define LORA_EXT_DEVICE inline
#endif

namespace lora_ext::ptx {

// Whether instructions that only sm_90a has (wgmma, setmaxnreg) may be used on the target.
#if defined(__CUDACC__) && !defined(__CUDA_ARCH_FEAT_SM90_ALL)
constexpr bool kHasSm90a = false;
#else
constexpr bool kHasSm90a = true;
#endif

}  // namespace lora_ext::ptx
