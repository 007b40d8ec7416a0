// What a function of csrc/ptx/ is on each target: inline asm for the device, and for the host a
// call of the function of the same name in the execution layer (tests/emulator/).
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define LORA_EXT_DEVICE __device__ __forceinline__
#else
#include "emulator/emulator.h"
#define LORA_EXT_DEVICE inline
#endif
