#define INSTANCE(...) template __global__ void __VA_ARGS__;
#include "emulated/kernels/launch.h"
#include "emulated/kernels/lora_decode.h"
